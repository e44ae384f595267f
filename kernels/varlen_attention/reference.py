# SPDX-License-Identifier: Apache-2.0
"""The definition of varlen_attention in plain PyTorch: clip by clip, explicit softmax, autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from masktrain.kernels.philox import Purpose, philox_words

HALVES = 1 << 16


def keep_factors(
    n: int, heads: int, dropout_p: float, counter: Tensor, clip_id: Tensor, *, site: int
) -> Tensor:
    """Return (heads, n, n) float64: 0 where the weight of (head, query, key) is dropped, else 1 / (1 - p).

    p is dropout_p rounded to 1/65536. clip_id: (1,) int64. Row i of a head takes 8 * ceil(n / 8) 16-bit
    halves of the stream site * 65536 + head, the low half of a word first; a weight is dropped iff its half
    is below p * 65536.
    """
    threshold = round(dropout_p * HALVES)
    row = 8 * ((n + 7) // 8)
    factors = []
    for head in range(heads):
        words = philox_words(
            counter, clip_id, n * row // 2, purpose=Purpose.ATTENTION_DROPOUT, stream=site * HALVES + head
        )[0]
        halves = torch.stack((words & (HALVES - 1), words >> 16), dim=-1).view(n, row)[:, :n]
        factors.append((halves >= threshold).double() * (HALVES / (HALVES - threshold)))
    return torch.stack(factors)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    lengths: tuple[int, ...],
    *,
    dropout_p: float,
    counter: Tensor | None,
    clip_ids: Tensor | None,
    site: int,
) -> Tensor:
    """See op.py. Computes in at least float32."""
    heads, width = q.shape[1:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if not lengths:
        return q + k + v
    outputs = []
    clips = zip(*(x.to(dtype).split(lengths) for x in (q, k, v)), strict=True)
    with torch.autocast(q.device.type, enabled=False):
        for b, (qb, kb, vb) in enumerate(clips):
            scores = torch.einsum("ihd,jhd->hij", qb, kb) / math.sqrt(width)
            weights = scores.softmax(-1)
            if dropout_p > 0 and lengths[b]:
                assert counter is not None and clip_ids is not None
                factors = keep_factors(lengths[b], heads, dropout_p, counter, clip_ids[b : b + 1], site=site)
                weights = weights * factors.to(dtype)
            outputs.append(torch.einsum("hij,jhd->ihd", weights, vb).to(q.dtype))
    return torch.cat(outputs)
