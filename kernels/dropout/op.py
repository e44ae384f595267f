# SPDX-License-Identifier: Apache-2.0
"""dropout, and the multipliers of attention dropout: bits are made where they are needed and never kept."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import (
    FLOATS,
    check_at_least,
    check_counts,
    check_devices,
    check_tensor,
    dtype_names,
)
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked, why_not
from masktrain.kernels.dropout import _native, _triton, reference
from masktrain.kernels.philox.op import check_below

DROPOUT = (
    Implementation("triton", _triton.dropout, why_not, not_unasked),
    Implementation("native", _native.dropout, _native.why_not),
    Implementation("reference", reference.dropout, lambda *_: None),
)
ATTENTION_KEEP_PADDED = (
    Implementation("native", _native.attention_keep_padded, _native.why_not),
    Implementation("reference", reference.attention_keep_padded, lambda *_: None),
)


def dropout(
    x: Tensor,
    p: float,
    counter: Tensor,
    row_ids: Tensor,
    row_pos: Tensor,
    *,
    site: int,
    implementation: str | None = None,
) -> Tensor:
    """Return `x` with each value dropped (set to 0) with probability p, and the others scaled by 1 / (1 - p).

    x: (N, D) float, rows of tokens. p: in [0, 1), rounded to a multiple of 1/65536; 0 returns x itself.
    counter: (2,) int64 [seed, step]. row_ids: (N,) int64, the clip id of each row. row_pos: (N,) int64, the
    row's position in its clip. site: in [0, 2^32), another one for each place in the model that drops. All
    tensors on one device.

    Value d of row n uses 16-bit half d % 8 of Philox block row_pos[n] * ceil(D / 8) + d // 8 (to 32 bits)
    with the purpose DROPOUT, stream site and id row_ids[n]. It is dropped iff the half is below
    round(p * 65536). So the bits of a clip depend on neither its neighbours nor the rank or micro-batch that
    computes it.

    Returns (N, D) in the dtype of x. Differentiable any number of times: backward makes the bits again, and
    only counter, row_ids and row_pos are saved.
    Raises TypeError or ValueError for an argument of a wrong type, shape, device or range.
    """
    op = "dropout"
    check_tensor(op, "x", x, FLOATS, ("N", "D"))
    check_tensor(op, "counter", counter, (torch.int64,), (2,))
    check_tensor(op, "row_ids", row_ids, (torch.int64,), (x.shape[0],))
    check_tensor(op, "row_pos", row_pos, (torch.int64,), (x.shape[0],))
    check_devices(op, x=x, counter=counter, row_ids=row_ids, row_pos=row_pos)
    check_below(op, "site", site, 1 << 32)
    threshold = _threshold(op, p)
    if threshold == 0:
        return x
    choice = choose(op, DROPOUT, x, x.dtype, request=implementation)
    return choice.function(x, threshold, counter, row_ids, row_pos, site=site)


def attention_keep_padded(
    lengths: tuple[int, ...],
    heads: int,
    p: float,
    counter: Tensor,
    clip_ids: Tensor,
    *,
    site: int,
    dtype: torch.dtype = torch.float32,
    implementation: str | None = None,
) -> Tensor:
    """Return what to multiply attention weights with for dropout: 0 or 1 / (1 - p), and 0 outside a clip.

    lengths: rows of each clip, n_max their maximum. heads: at most 65536. p: as for `dropout`; with p = 0 all
    multipliers in a clip are 1. counter: (2,) int64 [seed, step]. clip_ids: (B,) int64 on the same device.
    site: in [0, 65536), another one for each attention layer.

    Query i and key j of head h of a clip of n rows use 16-bit half j % 8 of Philox block i * ceil(n / 8) + j
    // 8 with the purpose ATTENTION_DROPOUT, stream site * 65536 + h and the clip's id. The bits do not depend
    on n_max.

    Returns (B, heads, n_max, n_max) in `dtype`.
    Raises TypeError or ValueError for an argument of a wrong type, shape, device or range.
    """
    op = "attention_keep_padded"
    check_tensor(op, "clip_ids", clip_ids, (torch.int64,), ("B",))
    check_counts(op, "lengths", lengths, clip_ids.shape[0])
    check_tensor(op, "counter", counter, (torch.int64,), (2,))
    check_devices(op, clip_ids=clip_ids, counter=counter)
    check_at_least(op, "heads", heads, 1)
    check_below(op, "heads", heads, (1 << 16) + 1)
    check_below(op, "site", site, 1 << 16)
    if dtype not in FLOATS:
        raise TypeError(f"{op}: dtype must be {dtype_names(FLOATS)}, received {dtype}.")
    threshold = _threshold(op, p)
    choice = choose(op, ATTENTION_KEEP_PADDED, clip_ids, dtype, request=implementation)
    return choice.function(lengths, heads, threshold, counter, clip_ids, site=site, dtype=dtype)


def _threshold(op: str, p: float) -> int:
    """Return round(p * 65536), the number of 16-bit halves that drop."""
    if not 0 <= p < 1 or round(p * reference.HALVES) == reference.HALVES:
        raise ValueError(f"{op}: p must lie in [0, 1 - 2^-17), received {p!r}.")
    return round(p * reference.HALVES)
