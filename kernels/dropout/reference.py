# SPDX-License-Identifier: Apache-2.0
"""Dropout by counter-based 16-bit decisions, in plain PyTorch: the definition.

One Philox block gives eight decisions: half h of a block is the low (h even) or the high (h odd) 16 bits of
its word h // 2. A value is dropped iff its half is below round(p * 65536), and what is kept is scaled by one
over the share that is kept, so p is exact to 1/65536 and the mean is kept exactly. Rows of decisions start at
a new block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels.philox.reference import LOW16, Purpose, philox_blocks

HALVES = 1 << 16


def keep_scale(threshold: int) -> float:
    """Return the factor of kept values, for `threshold` = round(p * 65536)."""
    return HALVES / (HALVES - threshold)


def halves_of(words: Tensor, n: int) -> Tensor:
    """Return the first `n` 16-bit halves of each row of blocks: (..., K, 4) words -> (..., n)."""
    halves = torch.stack((words & LOW16, words >> 16), dim=-1)
    return halves.flatten(-3)[..., :n]


def dropout_keep(
    width: int, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, site: int
) -> Tensor:
    """Return which values of rows of `width` are kept: (N, width) bool."""
    per_row = (width + 7) // 8
    blocks = row_pos[:, None] * per_row + torch.arange(per_row, device=row_pos.device)
    words = philox_blocks(counter, row_ids[:, None], blocks, purpose=Purpose.DROPOUT, stream=site)
    return halves_of(words, width) >= threshold


def dropout(
    x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, *, site: int
) -> Tensor:
    """Return `x` (N, D) with dropped values 0 and kept values scaled. See `op.dropout`."""
    return _Dropout.apply(x, threshold, counter, row_ids, row_pos, site)


class _Dropout(torch.autograd.Function):
    """The op is linear in x, so its backward is the op itself, with the bits made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, site: int
    ) -> Tensor:
        ctx.save_for_backward(counter, row_ids, row_pos)
        ctx.threshold, ctx.site = threshold, site
        return _apply(x, threshold, counter, row_ids, row_pos, site)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counter, row_ids, row_pos = ctx.saved_tensors
        grad_x = _apply(grad, ctx.threshold, counter, row_ids, row_pos, ctx.site)
        return grad_x, None, None, None, None, None


def _apply(x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, site: int) -> Tensor:
    keep = dropout_keep(x.shape[1], threshold, counter, row_ids, row_pos, site)
    return torch.where(keep, x * keep_scale(threshold), 0.0)


def attention_keep_padded(
    lengths: tuple[int, ...],
    heads: int,
    threshold: int,
    counter: Tensor,
    clip_ids: Tensor,
    *,
    site: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the multipliers of attention weights: (B, heads, n_max, n_max). See `op.attention_keep_padded`."""
    # Cell (query i, key j) of head h of a clip of n rows: half j % 8 of block i * ceil(n / 8) + j // 8.
    n_max, device = max(lengths, default=0), clip_ids.device
    sizes: Any = n_max
    if len(set(lengths)) > 1:
        sizes = torch.tensor(lengths, device=device)[:, None, None, None]
    query = torch.arange(n_max, device=device)[:, None]
    stream = site * HALVES + torch.arange(heads, device=device)[:, None, None]
    blocks = query * ((sizes + 7) // 8) + torch.arange((n_max + 7) // 8, device=device)
    ids = clip_ids[:, None, None, None]
    words = philox_blocks(counter, ids, blocks, purpose=Purpose.ATTENTION_DROPOUT, stream=stream)
    keep = halves_of(words, n_max) >= threshold
    if isinstance(sizes, Tensor):
        keep &= (query < sizes) & (query.mT < sizes)
    return keep.to(dtype) * keep_scale(threshold)
