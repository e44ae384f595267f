# SPDX-License-Identifier: Apache-2.0
"""masked_patch_loss in Triton: targets are read from the spectrogram where they are compared, and never stored.

The sum has two stages with fixed bounds, so it is the same every time. Backward reads the targets again. Not yet
measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._triton import block_of, cdiv, jit, on, tl
from masktrain.kernels.mask_gather._triton import halvings, load_patches
from masktrain.kernels.masked_patch_loss.reference import EPS

# Cells of a tile, which holds whole patches: the mean and variance of a patch are those of a row.
TILE, MOST_VALUES = 2048, 8192

_library = torch.library.Library("masktrain", "FRAGMENT")
_DATA = (
    "Tensor frames, Tensor cu_frames, Tensor cu_tokens, Tensor masked, Tensor mean, Tensor scale, SymInt freq, "
    "SymInt patch_freq, SymInt patch_time, bool time_major, bool standardise"
)
_library.define(f"masked_patch_loss_triton(Tensor pred, {_DATA}) -> Tensor")
_library.define(f"masked_patch_loss_backward_triton(Tensor grad, Tensor pred, {_DATA}) -> Tensor")


def why_not(pred: Tensor, frames: Tensor) -> str | None:
    """Return None if Triton serves predictions and frames like these, else why not."""
    if pred.shape[1] > MOST_VALUES:
        return f"the Triton kernel takes patches of at most {MOST_VALUES} values, not {pred.shape[1]}"
    return _triton.why_not(pred, pred.dtype) or _triton.why_not(
        frames, frames.dtype, allowed=(torch.float32,)
    )


@jit(do_not_specialize=["n_masked", "n_clips"])
def masked_patch_loss_kernel(
    out_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    pred_ptr: tl.tensor,
    frames_ptr: tl.tensor,
    cu_frames_ptr: tl.tensor,
    cu_tokens_ptr: tl.tensor,
    masked_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    n_masked: tl.tensor,
    n_clips: tl.tensor,
    bins: tl.tensor,
    mean_step: tl.tensor,
    scale_step: tl.tensor,
    eps: tl.tensor,
    FREQ: tl.constexpr,
    PATCH_FREQ: tl.constexpr,
    PATCH_TIME: tl.constexpr,
    TIME_MAJOR: tl.constexpr,
    STANDARDISE: tl.constexpr,
    BACKWARD: tl.constexpr,
    HALVINGS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """Program i: ROWS masked tokens from i * ROWS on. Forward writes out[i], the sum of their squared errors, float32.
    Backward writes their rows of out (n_masked, P), the gradient of pred; grad: float32, of the sum."""
    P: tl.constexpr = PATCH_FREQ * PATCH_TIME
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < n_masked
    index = tl.load(masked_ptr + row, mask=exists, other=0)
    value = tl.arange(0, VALUES)
    target = load_patches(
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
    inside = exists[:, None] & (value < P)[None, :]
    if STANDARDISE:
        average = tl.sum(target, 1) / P
        target = tl.where(inside, target - average[:, None], 0.0)
        variance = tl.sum(target * target, 1) / (P - 1)
        target = tl.div_rn(target, tl.sqrt_rn(variance + eps)[:, None])
    offset = row[:, None] * P + value[None, :]
    pred = tl.load(pred_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    error = pred - target
    if BACKWARD:
        grad = 2.0 * tl.load(grad_ptr)
        tl.store(out_ptr + offset, (grad * error).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + tl.program_id(0), tl.sum(tl.sum(error * error, 1), 0))


def masked_patch_loss(
    pred: Tensor,
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    masked: Tensor,
    *,
    mean: Tensor,
    scale: Tensor,
    norm_pix_loss: bool,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
) -> Tensor:
    """See op.py."""
    return torch.ops.masktrain.masked_patch_loss_triton(
        pred,
        frames,
        cu_frames,
        cu_tokens,
        masked,
        mean,
        scale,
        freq,
        patch_freq,
        patch_time,
        order == "time",
        norm_pix_loss,
    )


def _launch(
    out: Tensor,
    grad: Tensor | None,
    pred: Tensor,
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    masked: Tensor,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    time_major: bool,
    standardise: bool,
    *,
    rows: int,
) -> None:
    pred, frames, cu_frames, cu_tokens, masked, mean, scale = (
        t.contiguous() for t in (pred, frames, cu_frames, cu_tokens, masked, mean, scale)
    )
    n_masked, n_clips = masked.shape[0], cu_tokens.shape[0] - 1
    with on(pred):
        masked_patch_loss_kernel[(cdiv(n_masked, rows),)](
            out,
            out if grad is None else grad,
            pred,
            frames,
            cu_frames,
            cu_tokens,
            masked,
            mean,
            scale,
            n_masked,
            n_clips,
            frames.shape[1],
            int(mean.numel() > 1),
            int(scale.numel() > 1),
            EPS,
            FREQ=freq,
            PATCH_FREQ=patch_freq,
            PATCH_TIME=patch_time,
            TIME_MAJOR=time_major,
            STANDARDISE=standardise,
            BACKWARD=grad is not None,
            HALVINGS=halvings(n_clips),
            ROWS=rows,
            VALUES=block_of(pred.shape[1]),
        )


def _rows(pred: Tensor) -> int:
    """Return how many patches a tile has."""
    return block_of(pred.shape[0], most=max(1, TILE // block_of(pred.shape[1])))


@torch.library.impl(_library, "masked_patch_loss_triton", "CompositeExplicitAutograd")
def _masked_patch_loss(pred: Tensor, *data: Any) -> Tensor:
    if pred.shape[0] == 0:
        return pred.new_zeros((), dtype=torch.float32)
    rows = _rows(pred)
    parts = pred.new_empty(cdiv(pred.shape[0], rows), dtype=torch.float32)
    _launch(parts, None, pred, *data, rows=rows)
    return parts.sum()


@torch.library.register_fake("masktrain::masked_patch_loss_triton", lib=_library)
def _masked_patch_loss_fake(pred: Tensor, *data: Any) -> Tensor:
    return pred.new_empty((), dtype=torch.float32)


@torch.library.impl(_library, "masked_patch_loss_backward_triton", "CompositeExplicitAutograd")
def _masked_patch_loss_backward(grad: Tensor, pred: Tensor, *data: Any) -> Tensor:
    out = pred.new_empty(pred.shape)
    if pred.shape[0]:
        _launch(out, grad.contiguous(), pred, *data, rows=_rows(pred))
    return out


@torch.library.register_fake("masktrain::masked_patch_loss_backward_triton", lib=_library)
def _masked_patch_loss_backward_fake(grad: Tensor, pred: Tensor, *data: Any) -> Tensor:
    return pred.new_empty(pred.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_pred = torch.ops.masktrain.masked_patch_loss_backward_triton(grad, *saved, *ctx.options)
    return (grad_pred, *[None] * (len(saved) - 1 + len(ctx.options)))


torch.library.register_autograd(
    "masktrain::masked_patch_loss_triton", _backward, setup_context=_save, lib=_library
)
