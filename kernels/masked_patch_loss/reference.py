# SPDX-License-Identifier: Apache-2.0
"""The definition of masked_patch_loss in plain PyTorch.

Backward reads the target from the spectrogram again: besides pred, which the model holds anyway, only the
indices are saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from masktrain.kernels.mask_gather.reference import mask_gather

EPS = 1e-6


def residual(
    pred: Tensor,
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    masked: Tensor,
    mean: Tensor,
    scale: Tensor,
    *,
    norm_pix_loss: bool,
    **grid: Any,
) -> Tensor:
    """Return (M, P) pred - target in at least float32."""
    dtype = torch.promote_types(pred.dtype, frames.dtype)
    target = mask_gather(frames, cu_frames, cu_tokens, masked, mean=mean, scale=scale, dtype=dtype, **grid)
    if norm_pix_loss:
        variance, average = torch.var_mean(target, dim=1, keepdim=True)
        target = (target - average) / torch.sqrt(variance + EPS)
    return pred.to(dtype) - target


class _MaskedPatchLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, options: dict[str, Any], *data: Tensor) -> Tensor:
        ctx.save_for_backward(pred, *data)
        ctx.options = options
        return residual(pred, *data, **options).square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, *data = ctx.saved_tensors
        grad_pred = (2 * grad * residual(pred, *data, **ctx.options)).to(pred.dtype)
        return (grad_pred, None, *([None] * len(data)))


def masked_patch_loss(
    pred: Tensor,
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    masked: Tensor,
    *,
    mean: Tensor,
    scale: Tensor,
    **options: Any,
) -> Tensor:
    """See op.py."""
    return _MaskedPatchLoss.apply(pred, options, frames, cu_frames, cu_tokens, masked, mean, scale)
