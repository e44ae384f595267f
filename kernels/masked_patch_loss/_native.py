# SPDX-License-Identifier: Apache-2.0
"""masked_patch_loss and its gradient by the native library: targets are read where they are used, never stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels.mask_gather._native import Patches

LARGEST_PATCH = 4096
"""MT_LARGEST_PATCH of csrc/include/masktrain_c.h."""

LOSS = {torch.float32: "mt_masked_patch_loss_f32", torch.float64: "mt_masked_patch_loss_f64"}
GRAD = {torch.float32: "mt_masked_patch_loss_grad_f32", torch.float64: "mt_masked_patch_loss_grad_f64"}

_DATA = (
    "Tensor frames, Tensor cu_frames, Tensor cu_tokens, Tensor masked, Tensor mean, Tensor scale, "
    "SymInt freq, SymInt patch_freq, SymInt patch_time, bool by_time, bool normalise"
)
_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(f"masked_patch_loss(Tensor pred, {_DATA}) -> Tensor")
_library.define(f"masked_patch_loss_grad(Tensor grad, Tensor pred, {_DATA}) -> Tensor")


def why_not(pred: Tensor, frames: Tensor) -> str | None:
    """Return None if the native library serves these arguments of the op, else why not."""
    if pred.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {pred.device}"
    if pred.dtype not in LOSS or pred.dtype != frames.dtype:
        return f"the native library takes all in float32 or in float64, not {pred.dtype} and {frames.dtype}"
    if pred.shape[1] > LARGEST_PATCH:
        return f"the native library takes patches of at most {LARGEST_PATCH} values, not {pred.shape[1]}"
    return _native.why_not()


def masked_patch_loss(
    pred: Tensor,
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    masked: Tensor,
    *,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
    norm_pix_loss: bool,
) -> Tensor:
    """See op.py."""
    data = (frames, cu_frames, cu_tokens, masked, mean, scale)
    grid = (freq, patch_freq, patch_time, order == "time")
    return torch.ops.masktrain.masked_patch_loss(pred, *data, *grid, norm_pix_loss)


@torch.library.impl(_library, "masked_patch_loss", "CPU")
def _loss(pred: Tensor, *data: Any) -> Tensor:
    *patch_data, normalise = data
    pred, patches = pred.contiguous(), Patches(*patch_data)
    out = pred.new_empty(())
    partial = torch.empty(pred.shape[0], dtype=torch.float64)
    getattr(_native.require(), LOSS[pred.dtype])(
        out.data_ptr(),
        partial.data_ptr(),
        pred.data_ptr(),
        *patches.arguments,
        normalise,
        _native.threads(),
    )
    return out


@torch.library.register_fake("masktrain::masked_patch_loss", lib=_library)
def _loss_fake(pred: Tensor, *data: Any) -> Tensor:
    return pred.new_empty(())


@torch.library.impl(_library, "masked_patch_loss_grad", "CPU")
def _grad(grad: Tensor, pred: Tensor, *data: Any) -> Tensor:
    *patch_data, normalise = data
    pred, patches = pred.contiguous(), Patches(*patch_data)
    out = torch.empty_like(pred)
    getattr(_native.require(), GRAD[pred.dtype])(
        out.data_ptr(),
        grad.data_ptr(),
        pred.data_ptr(),
        *patches.arguments,
        normalise,
        _native.threads(),
    )
    return out


@torch.library.register_fake("masktrain::masked_patch_loss_grad", lib=_library)
def _grad_fake(grad: Tensor, pred: Tensor, *data: Any) -> Tensor:
    return pred.new_empty(pred.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.grid = inputs[7:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pred, *data = ctx.saved_tensors
    grad_pred = torch.ops.masktrain.masked_patch_loss_grad(grad, pred, *data, *ctx.grid)
    return (grad_pred, *[None] * (len(data) + len(ctx.grid)))


torch.library.register_autograd("masktrain::masked_patch_loss", _backward, setup_context=_save, lib=_library)
