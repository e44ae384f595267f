# SPDX-License-Identifier: Apache-2.0
"""varlen_attention in Triton: softmax by tiles, forward and backward, with counter-based dropout.

A program computes the rows of one tile of one clip in one head and walks over the clip's other side in blocks, so
no N x N tensor exists; a table made from the lengths on the host lists the tiles, and a ragged batch launches no
idle programs. The softmax is computed online as in Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018), and the weights are computed again in backward as in Dao, "FlashAttention-2" (2023), here with the
dropout bits: each is a function of (seed, step, clip, site, head, query, key), so no mask is stored. Saved for
backward are q, k, v, the output and one log-sum-exp per row and head.

Backward is two kernels, one by queries (dq, and the row sums `delta` that both need), one by keys (dk, dv): each
value has one writer, so results are the same in every run.

Softmax and sums are float32. Products take operands in the dtype of the inputs, float32 ones without TF32.
Not yet measured on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._tiles import tile_table
from masktrain.kernels._triton import block_of, halves_of, jit, load_key, on, philox_4x32, tl
from masktrain.kernels.dropout.reference import HALVES, keep_scale
from masktrain.kernels.philox import Purpose

# Wider heads need tiles of another shape.
MAX_WIDTH = 128
# tl.dot needs triton's tensor core path; below, its code keeps whole tiles on the stack.
LEAST_CAPABILITY = (8, 0)
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tiling:
    """rows: of a tile. columns: of a block of the walk. warps, stages: of Triton."""

    rows: int
    columns: int
    warps: int
    stages: int


def tiling(dtype: torch.dtype, width: int, dropout: bool, backward: bool) -> Tiling:
    """Return the tiling: what compiles for sm_80 to sm_90 without spilling registers. Speed is not yet measured."""
    if dtype == torch.float32:
        rows, columns = (32, 16 if backward else 32) if width <= 64 else (16, 16)
        return Tiling(rows, columns, 4, 2)
    if width > 64:
        return Tiling(64, 32, 8, 1)
    return Tiling(64, 32, 4, 2) if dropout and backward else Tiling(64, 64, 4, 2)


def why_not(q: Tensor, threshold: int) -> str | None:
    """Return None if the Triton kernel serves, else why not. threshold: 0 for no dropout."""
    reason = _triton.why_not(q, q.dtype)
    if reason is not None:
        return reason
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < LEAST_CAPABILITY:
        return "the Triton kernel's matrix products need compute capability 8.0 or newer"
    if not 1 <= q.shape[2] <= MAX_WIDTH:
        return f"the Triton kernel takes head widths up to {MAX_WIDTH}, not {q.shape[2]}"
    return None


def not_unasked(q: Tensor, threshold: int) -> str | None:
    """Return why the Triton kernel serves only when asked for by name, or None."""
    if threshold == 0:
        return (
            "without dropout torch's fused attention serves; the Triton kernel is not yet measured on a GPU"
        )
    return _triton.not_unasked(q)


@jit
def _load(
    ptr: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> Any:
    """Return rows of a clip of n rows as (rows, BLOCK_D), 0 outside."""
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows[:, None] < n) & (d < WIDTH)
    return tl.load(ptr + rows[:, None].to(tl.int64) * stride + d, mask=inside, other=0.0)


@jit
def _store(
    ptr: tl.tensor,
    value: tl.tensor,
    rows: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows[:, None] < n) & (d < WIDTH)
    tl.store(ptr + rows[:, None].to(tl.int64) * stride + d, value.to(ptr.dtype.element_ty), mask=inside)


@jit
def _tile(
    tiles_ptr: tl.tensor,
) -> Any:
    """Return (start, n, first, clip) of this program: first row of the clip in the batch, rows of the clip, first
    row of the tile in the clip, place of the clip in the batch."""
    entry = tiles_ptr + tl.program_id(0) * 4
    return tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@jit
def _kept(
    queries: tl.tensor,
    first_key: tl.tensor,
    n: tl.tensor,
    threshold: tl.tensor,
    stream: tl.tensor,
    clip_id: tl.tensor,
    step: tl.tensor,
    k0: tl.tensor,
    k1: tl.tensor,
    KEYS: tl.constexpr,
) -> Any:
    """Return which weights of queries x KEYS keys from `first_key`, a multiple of 8, are kept."""
    in_row = first_key // 8 + tl.arange(0, KEYS // 8)
    blocks = queries[:, None] * ((n + 7) // 8) + in_row[None, :]
    w0, w1, w2, w3 = philox_4x32(blocks.to(tl.uint32), stream, clip_id, step, k0, k1)
    return halves_of(w0, w1, w2, w3) >= threshold


@jit(do_not_specialize=["n_rows", "threshold", "site"])
def forward_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    out_row: tl.tensor,
    n_rows: tl.tensor,
    score_scale: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    site: tl.tensor,
    PURPOSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out: (n_rows, H, WIDTH), rows of out_row values. lse: (H, n_rows) float32, of the scores in units of log 2.

    score_scale: log2(e) / sqrt(WIDTH).
    """
    start, n, first, clip = _tile(tiles_ptr)
    head = tl.program_id(1)
    h = head.to(tl.int64)
    queries = first + tl.arange(0, ROWS)
    k_ptr += start * k_row + h * k_head
    v_ptr += start * v_row + h * v_head
    q = _load(q_ptr + start * q_row + h * q_head, queries, n, q_row, WIDTH, BLOCK_D)
    if DROPOUT:
        k0, k1, step = load_key(counter_ptr, PURPOSE)
        clip_id = tl.load(ids_ptr + clip).to(tl.uint32)
        stream = site.to(tl.uint32) * 65536 + head.to(tl.uint32)

    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first_key in range(0, n, COLUMNS):
        keys = first_key + tl.arange(0, COLUMNS)
        k = _load(k_ptr, keys, n, k_row, WIDTH, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        scores = tl.where(keys[None, :] < n, scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            keep = _kept(
                queries, first_key, n, threshold.to(tl.uint32), stream, clip_id, step, k0, k1, COLUMNS
            )
            weights = tl.where(keep, weights, 0.0)
        v = _load(v_ptr, keys, n, v_row, WIDTH, BLOCK_D)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new_largest
    acc = acc / total[:, None]
    if DROPOUT:
        acc *= keep_scale
    _store(out_ptr + start * out_row + h * WIDTH, acc, queries, n, out_row, WIDTH, BLOCK_D)
    tl.store(lse_ptr + h * n_rows + start + queries, largest + tl.log2(total), mask=queries < n)


@jit(do_not_specialize=["n_rows", "threshold", "site"])
def by_queries_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dq_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    grad_row: tl.tensor,
    grad_head: tl.tensor,
    out_row: tl.tensor,
    n_rows: tl.tensor,
    scale: tl.tensor,
    score_scale: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    site: tl.tensor,
    PURPOSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """dq: as out. delta: (H, n_rows) float32, sum over d of grad * out."""
    start, n, first, clip = _tile(tiles_ptr)
    head = tl.program_id(1)
    h = head.to(tl.int64)
    queries = first + tl.arange(0, ROWS)
    k_ptr += start * k_row + h * k_head
    v_ptr += start * v_row + h * v_head
    row = h * n_rows + start + queries
    q = _load(q_ptr + start * q_row + h * q_head, queries, n, q_row, WIDTH, BLOCK_D)
    grad = _load(grad_ptr + start * grad_row + h * grad_head, queries, n, grad_row, WIDTH, BLOCK_D)
    out = _load(out_ptr + start * out_row + h * WIDTH, queries, n, out_row, WIDTH, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=queries < n)
    lse = tl.load(lse_ptr + row, mask=queries < n, other=float("inf"))
    if DROPOUT:
        k0, k1, step = load_key(counter_ptr, PURPOSE)
        clip_id = tl.load(ids_ptr + clip).to(tl.uint32)
        stream = site.to(tl.uint32) * 65536 + head.to(tl.uint32)

    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first_key in range(0, n, COLUMNS):
        keys = first_key + tl.arange(0, COLUMNS)
        k = _load(k_ptr, keys, n, k_row, WIDTH, BLOCK_D)
        v = _load(v_ptr, keys, n, v_row, WIDTH, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        weights = tl.where(keys[None, :] < n, tl.exp2(scores - lse[:, None]), 0.0)
        slope = tl.dot(grad, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            keep = _kept(
                queries, first_key, n, threshold.to(tl.uint32), stream, clip_id, step, k0, k1, COLUMNS
            )
            slope = tl.where(keep, slope * keep_scale, 0.0)
        slope = weights * (slope - delta[:, None])
        dq = tl.dot(slope.to(k.dtype), k, dq, input_precision="ieee")
    # A row that sees only itself has weight 1 whatever q and k are: exactly no slope.
    dq *= tl.where(n > 1, scale, 0.0)
    _store(dq_ptr + start * out_row + h * WIDTH, dq, queries, n, out_row, WIDTH, BLOCK_D)


@jit(do_not_specialize=["n_rows", "threshold", "site"])
def by_keys_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    grad_row: tl.tensor,
    grad_head: tl.tensor,
    out_row: tl.tensor,
    n_rows: tl.tensor,
    scale: tl.tensor,
    score_scale: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    site: tl.tensor,
    PURPOSE: tl.constexpr,
    DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """dk, dv: (n_rows, H, WIDTH), rows of out_row values. The rows of a tile are keys, its columns queries."""
    start, n, first, clip = _tile(tiles_ptr)
    head = tl.program_id(1)
    h = head.to(tl.int64)
    keys = first + tl.arange(0, ROWS)
    q_ptr += start * q_row + h * q_head
    grad_ptr += start * grad_row + h * grad_head
    lse_ptr += h * n_rows + start
    delta_ptr += h * n_rows + start
    k = _load(k_ptr + start * k_row + h * k_head, keys, n, k_row, WIDTH, BLOCK_D)
    v = _load(v_ptr + start * v_row + h * v_head, keys, n, v_row, WIDTH, BLOCK_D)
    if DROPOUT:
        k0, k1, step = load_key(counter_ptr, PURPOSE)
        clip_id = tl.load(ids_ptr + clip).to(tl.uint32)
        stream = site.to(tl.uint32) * 65536 + head.to(tl.uint32)

    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first_query in range(0, n, COLUMNS):
        queries = first_query + tl.arange(0, COLUMNS)
        q = _load(q_ptr, queries, n, q_row, WIDTH, BLOCK_D)
        # The weights of a query that does not exist are 0.
        lse = tl.load(lse_ptr + queries, mask=queries < n, other=float("inf"))
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        weights = tl.exp2(scores - lse[:, None])
        grad = _load(grad_ptr, queries, n, grad_row, WIDTH, BLOCK_D)
        used = weights
        if DROPOUT:
            keep = _kept(queries, first, n, threshold.to(tl.uint32), stream, clip_id, step, k0, k1, ROWS)
            used = tl.where(keep, weights, 0.0)
        dv = tl.dot(tl.trans(used.to(grad.dtype)), grad, dv, input_precision="ieee")
        slope = tl.dot(grad, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            slope = tl.where(keep, slope * keep_scale, 0.0)
        delta = tl.load(delta_ptr + queries, mask=queries < n, other=0.0)
        slope = weights * (slope - delta[:, None])
        dk = tl.dot(tl.trans(slope.to(q.dtype)), q, dk, input_precision="ieee")
    if DROPOUT:
        dv *= keep_scale
    dk *= tl.where(n > 1, scale, 0.0)
    _store(dk_ptr + start * out_row + h * WIDTH, dk, keys, n, out_row, WIDTH, BLOCK_D)
    _store(dv_ptr + start * out_row + h * WIDTH, dv, keys, n, out_row, WIDTH, BLOCK_D)


_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "varlen_attention_triton(Tensor q, Tensor k, Tensor v, SymInt[] lengths, SymInt threshold, Tensor? counter, "
    "Tensor? clip_ids, SymInt site) -> (Tensor out, Tensor lse)"
)
_library.define(
    "varlen_attention_triton_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "SymInt[] lengths, SymInt threshold, Tensor? counter, Tensor? clip_ids, SymInt site) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


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
    """See op.py. cu is not read: the table of tiles follows from the lengths."""
    threshold = round(dropout_p * HALVES)
    keys = (counter, clip_ids) if threshold else (None, None)
    return torch.ops.masktrain.varlen_attention_triton(q, k, v, lengths, threshold, *keys, site)[0]


def _packed(x: Tensor) -> Tensor:
    """Return (N, H, Dh) with neighbouring values of a head side by side; rows and heads may lie anywhere."""
    return x if x.stride(2) == 1 else x.contiguous()


@torch.library.impl(_library, "varlen_attention_triton", "CompositeExplicitAutograd")
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    threshold: int,
    counter: Tensor | None,
    clip_ids: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor]:
    q, k, v = _packed(q), _packed(k), _packed(v)
    out, lse = _outputs(q)
    n_rows, heads, width = q.shape
    t = tiling(q.dtype, width, threshold > 0, backward=False)
    tiles = tile_table(tuple(lengths), t.rows, q.device)
    if out.numel():
        with on(q):
            forward_kernel[(len(tiles), heads)](
                q,
                k,
                v,
                out,
                lse,
                tiles,
                *_random(counter, clip_ids),
                *q.stride()[:2],
                *k.stride()[:2],
                *v.stride()[:2],
                heads * width,
                n_rows,
                LOG2_E / math.sqrt(width),
                threshold,
                keep_scale(threshold),
                site,
                **_constants(t, width, threshold),
            )
    return out, lse


@torch.library.impl(_library, "varlen_attention_triton_backward", "CompositeExplicitAutograd")
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    threshold: int,
    counter: Tensor | None,
    clip_ids: Tensor | None,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = (_packed(x) for x in (grad, q, k, v))
    dq, dk, dv = (torch.empty_like(out) for _ in range(3))
    delta = torch.empty_like(lse)
    n_rows, heads, width = q.shape
    shared = (
        *_random(counter, clip_ids),
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *grad.stride()[:2],
        heads * width,
        n_rows,
        1 / math.sqrt(width),
        LOG2_E / math.sqrt(width),
        threshold,
        keep_scale(threshold),
        site,
    )
    if out.numel():
        t = tiling(q.dtype, width, threshold > 0, backward=True)
        tiles = tile_table(tuple(lengths), t.rows, q.device)
        grid, constants = (len(tiles), heads), _constants(t, width, threshold)
        with on(q):
            by_queries_kernel[grid](q, k, v, out, grad, lse, delta, dq, tiles, *shared, **constants)
            by_keys_kernel[grid](q, k, v, grad, lse, delta, dk, dv, tiles, *shared, **constants)
    return dq, dk, dv


def _random(counter: Tensor | None, clip_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (
        None if counter is None else counter.contiguous(),
        None if clip_ids is None else clip_ids.contiguous(),
    )


def _constants(t: Tiling, width: int, threshold: int) -> dict[str, Any]:
    return {
        "PURPOSE": int(Purpose.ATTENTION_DROPOUT),
        "DROPOUT": threshold > 0,
        "WIDTH": width,
        "BLOCK_D": block_of(width, least=16),
        "ROWS": t.rows,
        "COLUMNS": t.columns,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("masktrain::varlen_attention_triton", lib=_library)
def _forward_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.register_fake("masktrain::varlen_attention_triton_backward", lib=_library)
def _backward_fake(grad: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.lengths, ctx.threshold, counter, clip_ids, ctx.site = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, counter, clip_ids)
    ctx.mark_non_differentiable(lse)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, counter, clip_ids = ctx.saved_tensors
    grads = torch.ops.masktrain.varlen_attention_triton_backward(
        grad, *tensors, ctx.lengths, ctx.threshold, counter, clip_ids, ctx.site
    )
    return (*grads, None, None, None, None, None)


torch.library.register_autograd(
    "masktrain::varlen_attention_triton", _differentiate, setup_context=_save, lib=_library
)
