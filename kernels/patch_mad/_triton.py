# SPDX-License-Identifier: Apache-2.0
"""patch_mad in Triton: a program reads some patches once, and keeps them as integers until their scores are written.

Not yet measured on a GPU. Scores: those of the reference, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._triton import block_of, cdiv, jit, on, tl
from masktrain.kernels.mask_gather._triton import halvings, load_patches
from masktrain.kernels.patch_mad.reference import factor

# Cells of a program, and of a patch at most.
TILE, MOST_VALUES = 2048, 4096

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "patch_mad_triton(Tensor frames, Tensor cu_frames, Tensor cu_tokens, SymInt n_tokens, Tensor mean, "
    "Tensor scale, SymInt freq, SymInt patch_freq, SymInt patch_time, bool time_major) -> Tensor"
)


def why_not(frames: Tensor, values: int) -> str | None:
    """Return None if Triton serves frames like these and patches of so many values, else why not."""
    if values > MOST_VALUES:
        return f"the Triton kernel takes patches of at most {MOST_VALUES} values, not {values}"
    return _triton.why_not(frames, frames.dtype, allowed=(torch.float32,))


@jit(do_not_specialize=["n_tokens", "n_clips"])
def patch_mad_kernel(
    out_ptr: tl.tensor,
    frames_ptr: tl.tensor,
    cu_frames_ptr: tl.tensor,
    cu_tokens_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    factor: tl.tensor,
    n_tokens: tl.tensor,
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
    """out: (n_tokens,). Program i scores ROWS tokens from i * ROWS on. VALUES: at least the cells of a patch."""
    SIZE: tl.constexpr = PATCH_FREQ * PATCH_TIME
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = token < n_tokens
    value = tl.arange(0, VALUES)
    x = load_patches(
        frames_ptr,
        cu_frames_ptr,
        cu_tokens_ptr,
        mean_ptr,
        scale_ptr,
        token,
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
    x = tl.where(x == x, x, 0.0)
    x = tl.where(x < -16.0, -16.0, tl.where(x > 16.0, 16.0, x))
    # 1.5 * 2^23 has no room for what is below 1: the sum is rounded half to even.
    steps = ((x * 1024.0 + 12582912.0) - 12582912.0).to(tl.int32)
    away = tl.abs(SIZE * steps - tl.sum(steps, 1)[:, None])
    total = tl.sum(tl.where((value < SIZE)[None, :], away, 0).to(tl.int64), 1)
    tl.store(out_ptr + token, total.to(tl.float32) * factor, mask=exists)


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
    return torch.ops.masktrain.patch_mad_triton(
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


@torch.library.impl(_library, "patch_mad_triton", "CompositeExplicitAutograd")
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
    time_major: bool,
) -> Tensor:
    frames, cu_frames, cu_tokens, mean, scale = (
        t.contiguous() for t in (frames, cu_frames, cu_tokens, mean, scale)
    )
    n_values, n_clips = patch_freq * patch_time, cu_tokens.shape[0] - 1
    out = frames.new_empty(n_tokens, dtype=torch.float32)
    if n_tokens:
        values = block_of(n_values)
        rows = block_of(n_tokens, most=max(TILE // values, 1))
        with on(frames):
            patch_mad_kernel[(cdiv(n_tokens, rows),)](
                out,
                frames,
                cu_frames,
                cu_tokens,
                mean,
                scale,
                factor(n_values),
                n_tokens,
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


@torch.library.register_fake("masktrain::patch_mad_triton", lib=_library)
def _patch_mad_fake(
    frames: Tensor, cu_frames: Tensor, cu_tokens: Tensor, n_tokens: int, *_: object
) -> Tensor:
    return frames.new_empty(n_tokens, dtype=torch.float32)
