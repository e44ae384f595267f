# SPDX-License-Identifier: Apache-2.0
"""The public face of mask_gather: checks and dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels._checks import FLOATS, check_patches, dtype_names
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked
from masktrain.kernels.mask_gather import _native, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.mask_gather, _triton.why_not, not_unasked),
    Implementation("native", _native.mask_gather, _native.why_not),
    Implementation("reference", reference.mask_gather, lambda *_: None),
)


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
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return the normalised patches of the tokens in `index`, one row each; nothing else is read.

    frames: (T, F) float32 or float64, packed. cu_frames: (B+1,) int64. cu_tokens: (B+1,) int32; clip b has
    columns_b = (cu_tokens[b+1] - cu_tokens[b]) / freq patches along time. index: (K,) int32 token ids that
    count through the batch, in any order. mean, scale: (1,) or (F,), in the dtype of frames.

    Token t of a clip is row t % freq of column t // freq in order "time", and column t % columns_b of row t
    // columns_b in order "freq". Its patch covers bins row * patch_freq ... and frames column * patch_time
    ... of the clip. The value of a cell is (frame - mean) * scale, and 0 where the frame lies past the clip's
    end, whatever the packed neighbour holds. The values are flattened with the outer axis of `order` outer.

    Returns (K, patch_freq * patch_time) in `dtype` (default: that of frames); the arithmetic is done in the
    dtype of frames. The spectrogram is data: no gradient flows to it. Ids outside [0, N) are undefined.
    Raises TypeError or ValueError for a wrong dtype, shape, device or grid.
    """
    grid: dict[str, Any] = {"freq": freq, "patch_freq": patch_freq, "patch_time": patch_time, "order": order}
    check_patches("mask_gather", frames, cu_frames, cu_tokens, "index", index, mean=mean, scale=scale, **grid)
    dtype = frames.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"mask_gather: dtype must be {dtype_names(FLOATS)}, received {dtype!r}.")
    choice = choose("mask_gather", IMPLEMENTATIONS, frames, dtype, request=implementation)
    return choice.function(frames, cu_frames, cu_tokens, index, mean=mean, scale=scale, dtype=dtype, **grid)
