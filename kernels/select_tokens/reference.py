# SPDX-License-Identifier: Apache-2.0
"""The definition of select_tokens in plain PyTorch, and the helpers for ragged clips that block_marks shares.

Work is done on (B, L) with L the tokens of the longest clip; cells past a clip's end get the largest key. All
sizes are known on the host, so nothing waits for the device.

Keys of scores are made of integers alone, since the float logarithms of two libraries differ on a fifth of all
inputs. A number with the fraction point n bits up is said to be in Qn. log2 is interpolated linearly between 1025
values in Q26, and keeps the 22 bits below them: Q48. The error is at most 2e-7, and for u near 1 within 3e-4 of
-log2 u, since the last piece ends at 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from masktrain.kernels.philox import Purpose, philox_words

LAST = torch.iinfo(torch.int64).max
# Bits of a key below the class, and of a class.
KEY_BITS, CLASS_BITS = 33, 30
# log2(1 + i / 1024) in Q26. The nearest tie of the rounding is 1e5 times as far as the error of any math library.
LOG2 = torch.tensor([round(math.log2(1 + i / 1024) * 2**26) for i in range(1025)], dtype=torch.int32)
# float32 bits: of 2^-40, 2^40 and infinity.
LOWEST, HIGHEST, INFINITY = (127 - 40) << 23, (127 + 40) << 23, 255 << 23


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


def log2_of_fraction(fraction: Tensor, table: Tensor) -> Tensor:
    """Return log2(1 + fraction / 2^32) in Q48, for int64 in [0, 2^32)."""
    piece = fraction >> 22
    low, high = table[piece].long(), table[piece + 1].long()
    return (low << 22) + (high - low) * (fraction & 0x3FFFFF)


def log2_of(value: Tensor, table: Tensor) -> Tensor:
    """Return log2(value) in Q48, for int64 in [1, 2^62]."""
    exponent = torch.full_like(value, 62)
    for shift in (32, 16, 8, 4, 2, 1):
        small = value < 1 << (63 - shift)
        value = torch.where(small, value << shift, value)
        exponent = torch.where(small, exponent - shift, exponent)
    return (exponent << 48) + log2_of_fraction((value >> 30) & 0xFFFFFFFF, table)


def score_keys(scores: Tensor, words: Tensor | None) -> Tensor:
    """Return int64 keys in [0, 2^33) of float32 scores and words of one shape: log2 score - log2(-log2 u) in Q26, plus
    48, u = (word + 1/2) / 2^32. Without words the score's bits."""
    bits = scores.contiguous().view(torch.int32).long()
    bits = torch.where(bits > INFINITY, 0, bits)
    if words is None:
        return bits.clamp(min=0)
    table = LOG2.to(scores.device, non_blocking=True)
    bits = bits.clamp(LOWEST, HIGHEST)
    weight = ((bits >> 23) - 127 << 48) + log2_of_fraction((bits & 0x7FFFFF) << 9, table)
    # -log2 u, from 2^-32.5 up to 33: never 0.
    exponential = (33 << 48) - log2_of(2 * words + 1, table)
    return weight - (log2_of(exponential, table) - (48 << 48)) + (48 << 48) >> 22


def select_tokens(
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    n_visible: tuple[int, ...],
    counter: Tensor,
    clip_ids: Tensor,
    *,
    classes: Tensor | None,
    scores: Tensor | None,
    sample: bool,
    shared: bool,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    total, longest, total_visible = sum(n_tokens), max(n_tokens, default=0), sum(n_visible)
    if total == 0:
        empty = cu_tokens.new_empty(0)
        return empty, empty.clone()
    ids, exists = token_ids(cu_tokens, longest)
    index, words = ids.clamp(max=total - 1), None
    if scores is None or sample:
        draw_ids = clip_ids.new_zeros(1) if shared else clip_ids
        words = philox_words(counter, draw_ids, longest, purpose=Purpose.MASK, stream=stream)
    if scores is None:
        assert words is not None
        key, n_chosen = words, n_visible
    else:
        key = score_keys(scores[index], words if words is None else words.expand_as(index))
        n_chosen = tuple(n - v for n, v in zip(n_tokens, n_visible, strict=True))
    if classes is not None:
        key = key + (classes[index].long() << KEY_BITS)
    if scores is not None:
        # The largest are chosen: turned round, so that ties go to the lower token again.
        key = (1 << KEY_BITS + CLASS_BITS) - 1 - key
    key = torch.where(exists, key, LAST)
    # A stable sort gives ties to the lower index.
    by_key = key.argsort(dim=1, stable=True)
    first = torch.arange(longest, device=key.device) < per_clip(n_chosen, key.device)
    chosen = torch.zeros_like(exists).scatter_(1, by_key, first.expand_as(by_key)) & exists
    visible, masked = (chosen, exists & ~chosen) if scores is None else (exists & ~chosen, chosen)
    return compact(ids, visible, total_visible), compact(ids, masked, total - total_visible)
