# SPDX-License-Identifier: Apache-2.0
"""The public face of varlen_attention: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import FLOATS, check_counts, check_devices, check_tensor
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels.varlen_attention import _native, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.varlen_attention, _triton.why_not, _triton.not_unasked),
    Implementation("native", _native.varlen_attention, lambda *_: None),
    Implementation("reference", reference.varlen_attention, lambda *_: None),
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    lengths: tuple[int, ...],
    *,
    dropout_p: float = 0.0,
    counter: Tensor | None = None,
    clip_ids: Tensor | None = None,
    site: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(Dh)) v within each clip, every row attending to all rows of its clip.

    q, k, v: (N, H, Dh) float, packed by clip, N = sum(lengths). cu: (B+1,) int32 cumulative lengths. lengths:
    the lengths of the clips on the host.

    dropout_p in [0, 1), to 1/65536: the softmax weights are dropped with this probability and what is kept is
    scaled by 1 / (1 - p). Then counter (2,) int64 [seed, step] and clip_ids (B,) int64 key the bits: in a
    clip of n rows, head h, query i and key j take 16-bit half i * 8 * ceil(n / 8) + j of the stream
    site * 65536 + h with the purpose ATTENTION_DROPOUT; a weight is dropped iff its half is below
    round(p * 65536). Backward computes the same bits again. site: 0 ... 65535. H: at most 65536.

    The arithmetic follows the dtype of q, also under autocast.

    Returns (N, H, Dh). Differentiable in q, k and v; saved for backward grows linearly in N.
    Raises TypeError or ValueError for a wrong dtype, shape, device, length, probability or missing key.
    """
    op = "varlen_attention"
    check_tensor(op, "q", q, FLOATS, ("N", "H", "Dh"))
    check_tensor(op, "k", k, (q.dtype,), tuple(q.shape))
    check_tensor(op, "v", v, (q.dtype,), tuple(q.shape))
    check_counts(op, "lengths", lengths)
    if sum(lengths) != q.shape[0]:
        raise ValueError(f"{op}: lengths must add up to the {q.shape[0]} rows of q, received {sum(lengths)}.")
    check_tensor(op, "cu", cu, (torch.int32,), (len(lengths) + 1,))
    check_devices(op, q=q, k=k, v=v, cu=cu)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1), received {dropout_p!r}.")
    if not 0 <= site < 1 << 16:
        raise ValueError(f"{op}: site must lie in [0, 65536), received {site!r}.")
    threshold = round(dropout_p * reference.HALVES)
    if threshold == reference.HALVES:
        raise ValueError(f"{op}: dropout_p must lie below 1 - 2^-17, received {dropout_p!r}.")
    if threshold:
        if counter is None or clip_ids is None:
            raise ValueError(f"{op}: dropout_p > 0 needs counter and clip_ids, received None.")
        check_tensor(op, "counter", counter, (torch.int64,), (2,))
        check_tensor(op, "clip_ids", clip_ids, (torch.int64,), (len(lengths),))
        check_devices(op, q=q, counter=counter, clip_ids=clip_ids)
    choice = choose(op, IMPLEMENTATIONS, q, threshold, request=implementation)
    return choice.function(
        q,
        k,
        v,
        cu,
        lengths,
        dropout_p=threshold / reference.HALVES,
        counter=counter,
        clip_ids=clip_ids,
        site=site,
    )
