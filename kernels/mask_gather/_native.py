# SPDX-License-Identifier: Apache-2.0
"""mask_gather by the native library, as one torch op: the bits of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels import _native

FUNCTIONS = {torch.float32: "mt_mask_gather_f32", torch.float64: "mt_mask_gather_f64"}

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "mask_gather(Tensor frames, Tensor cu_frames, Tensor cu_tokens, Tensor index, Tensor mean, Tensor scale, "
    "SymInt freq, SymInt patch_freq, SymInt patch_time, bool by_time) -> Tensor"
)


def why_not(frames: Tensor, dtype: torch.dtype) -> str | None:
    """Return None if the native library gathers these frames into `dtype`, else why not."""
    if frames.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {frames.device}"
    if frames.dtype not in FUNCTIONS or dtype != frames.dtype:
        return f"the native library gathers float32 or float64 into the same, not {frames.dtype} into {dtype}"
    return _native.why_not()


def mask_gather(
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    index: Tensor,
    *,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
    dtype: torch.dtype,
) -> Tensor:
    """See op.py."""
    del dtype  # that of frames, as why_not demands
    return torch.ops.masktrain.mask_gather(
        frames, cu_frames, cu_tokens, index, mean, scale, freq, patch_freq, patch_time, order == "time"
    )


class Patches:
    """What the native functions that read patches are told of the spectrogram; it keeps the memory alive."""

    def __init__(
        self,
        frames: Tensor,
        cu_frames: Tensor,
        cu_tokens: Tensor,
        index: Tensor,
        mean: Tensor,
        scale: Tensor,
        freq: int,
        patch_freq: int,
        patch_time: int,
        by_time: bool,
    ) -> None:
        bins = frames.shape[1]
        kept = (frames, cu_frames, cu_tokens, index, mean.expand(bins), scale.expand(bins))
        self.tensors = tuple(t.contiguous() for t in kept)
        places = [t.data_ptr() for t in self.tensors]
        self.arguments = (places[0], *frames.shape, *places[1:3], cu_frames.shape[0] - 1, places[3])
        self.arguments += (index.shape[0], *places[4:], freq, patch_freq, patch_time, by_time)


@torch.library.impl(_library, "mask_gather", "CPU")
def _mask_gather(
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    index: Tensor,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    by_time: bool,
) -> Tensor:
    out = frames.new_empty(index.shape[0], patch_freq * patch_time)
    grid = (freq, patch_freq, patch_time, by_time)
    patches = Patches(frames, cu_frames, cu_tokens, index, mean, scale, *grid)
    function = getattr(_native.require(), FUNCTIONS[frames.dtype])
    function(out.data_ptr(), *patches.arguments, _native.threads())
    return out


@torch.library.register_fake("masktrain::mask_gather", lib=_library)
def _mask_gather_fake(
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    index: Tensor,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    by_time: bool,
) -> Tensor:
    return frames.new_empty(index.shape[0], patch_freq * patch_time)
