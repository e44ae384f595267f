# SPDX-License-Identifier: Apache-2.0
"""The definition of patch_info_nce in plain PyTorch.

Saved for backward: pred, target and one log-sum-exp per token, so memory grows linearly in M. The logits of a
few clips at a time are computed in forward and again in backward, and freed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits held at one time, unless one clip alone has more: 64 MiB in float32.
MAX_LOGITS = 1 << 24


def blocks(n_masked: tuple[int, ...]) -> Iterator[tuple[slice, int]]:
    """Yield (rows, tokens of a clip) of runs of neighbouring clips of equal size, each within MAX_LOGITS."""
    row = clip = 0
    while clip < len(n_masked):
        n = n_masked[clip]
        room = max(1, MAX_LOGITS // max(1, n * n))
        last = clip + 1
        while last < len(n_masked) and n_masked[last] == n and last - clip < room:
            last += 1
        stop = row + n * (last - clip)
        if n:
            yield slice(row, stop), n
        row, clip = stop, last


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b in their own dtype, which autocast would lower."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class _PatchInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, n_masked: tuple[int, ...], over: int) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
        lse = pred.new_empty(pred.shape[0], dtype=dtype)
        total = pred.new_zeros((), dtype=dtype)
        for rows, n in blocks(n_masked):
            p, t = (x[rows].to(dtype).unflatten(0, (-1, n)) for x in (pred, target))
            logits = _product(p, t.mT)
            lse[rows] = logits.logsumexp(over).flatten()
            total = total + (lse[rows] - logits.diagonal(dim1=1, dim2=2).flatten()).sum()
        ctx.save_for_backward(pred, target, lse)
        ctx.n_masked, ctx.over = n_masked, over
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, lse = ctx.saved_tensors
        need_pred, need_target = ctx.needs_input_grad[:2]
        grad_pred = torch.empty_like(pred) if need_pred else None
        grad_target = torch.empty_like(target) if need_target else None
        for rows, n in blocks(ctx.n_masked):
            p, t = (x[rows].to(lse.dtype).unflatten(0, (-1, n)) for x in (pred, target))
            # d loss / d logits = softmax - identity.
            slope = torch.exp(_product(p, t.mT) - lse[rows].unflatten(0, (-1, n)).unsqueeze(ctx.over))
            slope.diagonal(dim1=1, dim2=2).sub_(1)
            slope *= grad
            if grad_pred is not None:
                grad_pred[rows] = _product(slope, t).flatten(0, 1).to(pred.dtype)
            if grad_target is not None:
                grad_target[rows] = _product(slope.mT, p).flatten(0, 1).to(target.dtype)
        return grad_pred, grad_target, None, None


def patch_info_nce(
    pred: Tensor, target: Tensor, cu_masked: Tensor, n_masked: tuple[int, ...], *, axis: str
) -> Tensor:
    """See op.py. cu_masked is for implementations that run on the device; here the host's counts suffice."""
    return _PatchInfoNCE.apply(pred, target, n_masked, 2 if axis == "targets" else 1)
