# SPDX-License-Identifier: Apache-2.0
"""mask_gather in Triton: each cell is read once, where its token lies, and written once in the compute dtype.

Not yet measured on a GPU. Values: float32 arithmetic in the order of the reference, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._triton import DTYPES, block_of, cdiv, jit, on, tl

# Cells of a tile, and how many of them belong to one patch at most.
TILE, MOST_VALUES = 2048, 1024

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "mask_gather_triton(Tensor frames, Tensor cu_frames, Tensor cu_tokens, Tensor index, Tensor mean, "
    "Tensor scale, SymInt freq, SymInt patch_freq, SymInt patch_time, bool time_major, ScalarType dtype) -> Tensor"
)


def why_not(frames: Tensor, dtype: torch.dtype) -> str | None:
    """Return None if Triton serves frames like these with patches in `dtype`, else why not."""
    return _triton.why_not(frames, frames.dtype, allowed=(torch.float32,)) or _triton.why_not(
        frames, dtype, allowed=DTYPES
    )


@jit
def load_patches(
    frames_ptr: tl.tensor,
    cu_frames_ptr: tl.tensor,
    cu_tokens_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    index: tl.tensor,
    exists: tl.tensor,
    value: tl.tensor,
    n_clips: tl.tensor,
    bins: tl.tensor,
    mean_step: tl.tensor,
    scale_step: tl.tensor,
    FREQ: tl.constexpr,
    PATCH_FREQ: tl.constexpr,
    PATCH_TIME: tl.constexpr,
    TIME_MAJOR: tl.constexpr,
    HALVINGS: tl.constexpr,
) -> tl.tensor:
    """Return (R, V) float32: cells `value` (V,) of the normalised patches of tokens `index` (R,), 0 past a clip's end.

    exists: (R,), is there such a token. Cells at PATCH_FREQ * PATCH_TIME or beyond are 0. mean_step, scale_step: 0 for
    one value for all bins, 1 for a value per bin. 2 ** HALVINGS is at least n_clips.
    """
    # The last clip that starts at or before the token: clips without tokens are stepped over.
    clip = tl.zeros_like(index)
    for i in tl.static_range(HALVINGS):
        later = clip + (1 << (HALVINGS - 1 - i))
        start = tl.load(cu_tokens_ptr + later, mask=exists & (later < n_clips), other=2147483647)
        clip = tl.where(start <= index, later, clip)
    first = tl.load(cu_tokens_ptr + clip, mask=exists, other=0)
    token = index - first
    if TIME_MAJOR:
        column, row = token // FREQ, token % FREQ
        time, freq = value // PATCH_FREQ, value % PATCH_FREQ
    else:
        columns = tl.maximum((tl.load(cu_tokens_ptr + clip + 1, mask=exists, other=0) - first) // FREQ, 1)
        row, column = token // columns, token % columns
        freq, time = value // PATCH_TIME, value % PATCH_TIME

    start = tl.load(cu_frames_ptr + clip, mask=exists, other=0)
    n_frames = tl.load(cu_frames_ptr + clip + 1, mask=exists, other=0) - start
    frame = (column * PATCH_TIME)[:, None] + time[None, :]
    bin = (row * PATCH_FREQ)[:, None] + freq[None, :]
    cell = exists[:, None] & (value < PATCH_FREQ * PATCH_TIME)[None, :]
    inside = cell & (frame < n_frames[:, None])
    x = tl.load(frames_ptr + (start[:, None] + frame) * bins + bin, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + bin * mean_step, mask=cell, other=0.0)
    scale = tl.load(scale_ptr + bin * scale_step, mask=cell, other=0.0)
    return tl.where(inside, (x - mean) * scale, 0.0)


@jit(do_not_specialize=["n_index", "n_clips"])
def mask_gather_kernel(
    out_ptr: tl.tensor,
    frames_ptr: tl.tensor,
    cu_frames_ptr: tl.tensor,
    cu_tokens_ptr: tl.tensor,
    index_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    n_index: tl.tensor,
    n_clips: tl.tensor,
    bins: tl.tensor,
    mean_step: tl.tensor,
    scale_step: tl.tensor,
    FREQ: tl.constexpr,
    PATCH_FREQ: tl.constexpr,
    PATCH_TIME: tl.constexpr,
    TIME_MAJOR: tl.constexpr,
    HALVINGS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """out: (n_index, P). Program (i, j): ROWS tokens from i * ROWS on, VALUES cells of each from j * VALUES on."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < n_index
    index = tl.load(index_ptr + row, mask=exists, other=0)
    value = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    patch = load_patches(
        frames_ptr,
        cu_frames_ptr,
        cu_tokens_ptr,
        mean_ptr,
        scale_ptr,
        index,
        exists,
        value,
        n_clips,
        bins,
        mean_step,
        scale_step,
        FREQ,
        PATCH_FREQ,
        PATCH_TIME,
        TIME_MAJOR,
        HALVINGS,
    )
    tl.store(
        out_ptr + row[:, None] * (PATCH_FREQ * PATCH_TIME) + value[None, :],
        patch.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & (value < PATCH_FREQ * PATCH_TIME)[None, :],
    )


def halvings(n_clips: int) -> int:
    """Return how many steps find one of `n_clips` clips by halving."""
    return max(n_clips - 1, 0).bit_length()


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
    return torch.ops.masktrain.mask_gather_triton(
        frames, cu_frames, cu_tokens, index, mean, scale, freq, patch_freq, patch_time, order == "time", dtype
    )


@torch.library.impl(_library, "mask_gather_triton", "CompositeExplicitAutograd")
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
    time_major: bool,
    dtype: torch.dtype,
) -> Tensor:
    frames, cu_frames, cu_tokens, index, mean, scale = (
        t.contiguous() for t in (frames, cu_frames, cu_tokens, index, mean, scale)
    )
    n_index, n_values, n_clips = index.shape[0], patch_freq * patch_time, cu_tokens.shape[0] - 1
    out = frames.new_empty((n_index, n_values), dtype=dtype)
    if n_index:
        values = block_of(n_values, most=MOST_VALUES)
        rows = block_of(n_index, most=TILE // values)
        with on(frames):
            mask_gather_kernel[(cdiv(n_index, rows), cdiv(n_values, values))](
                out,
                frames,
                cu_frames,
                cu_tokens,
                index,
                mean,
                scale,
                n_index,
                n_clips,
                frames.shape[1],
                int(mean.numel() > 1),
                int(scale.numel() > 1),
                FREQ=freq,
                PATCH_FREQ=patch_freq,
                PATCH_TIME=patch_time,
                TIME_MAJOR=time_major,
                HALVINGS=halvings(n_clips),
                ROWS=rows,
                VALUES=values,
            )
    return out


@torch.library.register_fake("masktrain::mask_gather_triton", lib=_library)
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
    time_major: bool,
    dtype: torch.dtype,
) -> Tensor:
    return frames.new_empty((index.shape[0], patch_freq * patch_time), dtype=dtype)
