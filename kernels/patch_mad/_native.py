# SPDX-License-Identifier: Apache-2.0
"""patch_mad by the native library, as one torch op: the bits of the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels.mask_gather._native import Patches

FUNCTIONS = {torch.float32: "mt_patch_mad_f32", torch.float64: "mt_patch_mad_f64"}
# Values of a patch at most: MT_LARGEST_PATCH in masktrain_c.h.
MOST_VALUES = 4096

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "patch_mad(Tensor frames, Tensor cu_frames, Tensor cu_tokens, SymInt n_tokens, Tensor mean, Tensor scale, "
    "SymInt freq, SymInt patch_freq, SymInt patch_time, bool by_time) -> Tensor"
)


def why_not(frames: Tensor, values: int) -> str | None:
    """Return None if the native library serves frames like these and patches of so many values, else why not."""
    if frames.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {frames.device}"
    if values > MOST_VALUES:
        return f"the native library takes patches of at most {MOST_VALUES} values, not {values}"
    return _native.why_not()


def patch_mad(
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    *,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
) -> Tensor:
    """See op.py."""
    return torch.ops.masktrain.patch_mad(
        frames,
        cu_frames,
        cu_tokens,
        sum(n_tokens),
        mean,
        scale,
        freq,
        patch_freq,
        patch_time,
        order == "time",
    )


@torch.library.impl(_library, "patch_mad", "CPU")
def _patch_mad(
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    n_tokens: int,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    by_time: bool,
) -> Tensor:
    out, index = torch.empty(n_tokens), torch.arange(n_tokens, dtype=torch.int32)
    patches = Patches(frames, cu_frames, cu_tokens, index, mean, scale, freq, patch_freq, patch_time, by_time)
    function = getattr(_native.require(), FUNCTIONS[frames.dtype])
    function(out.data_ptr(), *patches.arguments, _native.threads())
    return out


@torch.library.register_fake("masktrain::patch_mad", lib=_library)
def _patch_mad_fake(
    frames: Tensor, cu_frames: Tensor, cu_tokens: Tensor, n_tokens: int, *_: object
) -> Tensor:
    return frames.new_empty(n_tokens, dtype=torch.float32)
