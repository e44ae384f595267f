# SPDX-License-Identifier: Apache-2.0
"""The definition of select_tokens in plain PyTorch, and the helpers for ragged clips that block_marks shares.

Work is done on (B, L) with L the tokens of the longest clip; cells past a clip's end get the largest key. All
sizes are known on the host, so nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels.philox import Purpose, philox_words

LAST = torch.iinfo(torch.int64).max


def per_clip(values: tuple[int, ...], device: torch.device) -> int | Tensor:
    """Return one int when all values are equal, which needs no copy to the device, else (B, 1) int64."""
    if len(set(values)) == 1:
        return values[0]
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)[:, None]


def token_ids(cu_tokens: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return (B, L) int32 ids that count through the batch, and (B, L) bool: does the clip have it."""
    position = torch.arange(longest, dtype=torch.int32, device=cu_tokens.device)
    start = cu_tokens[:-1, None]
    return start + position, position < cu_tokens[1:, None] - start


def compact(values: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Return the `count` chosen values in row-major order; the count is given, so nothing has to wait."""
    slot = torch.where(chosen, chosen.flatten().cumsum(0).view_as(chosen) - 1, count)
    return values.new_empty(count + 1).scatter_(0, slot.flatten(), values.flatten())[:count]


def select_tokens(
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    n_visible: tuple[int, ...],
    counter: Tensor,
    clip_ids: Tensor,
    *,
    classes: Tensor | None,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    total, longest, total_visible = sum(n_tokens), max(n_tokens, default=0), sum(n_visible)
    if total == 0:
        empty = cu_tokens.new_empty(0)
        return empty, empty.clone()
    ids, exists = token_ids(cu_tokens, longest)
    key = philox_words(counter, clip_ids.new_zeros(1) if shared else clip_ids, longest, purpose=Purpose.MASK)
    if classes is not None:
        key = key + (classes[ids.clamp(max=total - 1)].long() << 32)
    key = torch.where(exists, key, LAST)
    # A stable sort gives ties to the lower index.
    by_key = key.argsort(dim=1, stable=True)
    first = torch.arange(longest, device=key.device) < per_clip(n_visible, key.device)
    visible = torch.zeros_like(exists).scatter_(1, by_key, first.expand_as(by_key))
    masked = exists & ~visible
    return compact(ids, visible, total_visible), compact(ids, masked, total - total_visible)
