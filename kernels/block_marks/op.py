# SPDX-License-Identifier: Apache-2.0
"""The public face of block_marks: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import (
    check_at_least,
    check_choice,
    check_counts,
    check_devices,
    check_draw,
    check_shared,
    check_tensor,
)
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked
from masktrain.kernels.block_marks import _native, _triton, reference
from masktrain.kernels.philox.op import check_below
from masktrain.kernels.select_tokens._triton import why_not

IMPLEMENTATIONS = (
    Implementation("triton", _triton.block_marks, why_not, not_unasked),
    Implementation("native", _native.block_marks, _native.why_not),
    Implementation("reference", reference.block_marks, lambda *_: None),
)
CLAMPED = (
    Implementation("triton", _triton.clamped_blocks, why_not, not_unasked),
    Implementation("native", _native.clamped_blocks, _native.why_not),
    Implementation("reference", reference.clamped_blocks, lambda *_: None),
)
"""For growth "clamped"."""


def block_marks(
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    n_marked: tuple[int, ...] | None,
    counter: Tensor,
    clip_ids: Tensor,
    *,
    freq: int,
    order: str,
    sides: tuple[int, ...] = (3, 4, 5),
    growth: str = "clipped",
    blocks: tuple[int, ...] | None = None,
    truncation: str = "random",
    spare_first: bool = False,
    shared: bool = False,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Return (N,) uint8 marks (0 or 1) of square blocks on each clip's token grid, packed as the tokens are.

    With growth "clipped" or "wrap", a clip draws one side c uniformly from `sides`, then block starts uniformly, and
    each start marks its c x c block; it stops when strictly more than n_marked tokens are marked (or nothing is left
    to mark). With growth "clamped", it draws blocks[clip] centres, whatever they cover.

    cu_tokens: (B+1,) int32, the cumulative n_tokens; each a multiple of `freq`. n_marked: per clip, at most
    n_tokens; None with growth "clamped". counter: (2,) int64 [seed, step]. clip_ids: (B,) int64. order: "time" or "freq", how tokens are
    numbered.

    growth "clipped": blocks are cut at the grid's edges, and a start may lie up to c - 1 cells before the
    first row and column, so that c * c equally likely starts cover every cell, those at the edges too. growth
    "wrap": starts are tokens, and the block of start s is s + stride * i + j in flat token numbers (i, j < c;
    stride: cells of one row of the numbering), so it runs on into the next row; numbers past the end are
    dropped. That is the arithmetic of AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py and
    YuanGongND/ssast:src/models/ast_models.py, and under-masks the edges. spare_first: token 0 is never
    marked (SSAST).

    growth "clamped": `sides` holds one side c, `blocks` how many blocks each clip gets. Centres are drawn uniformly
    among the clip's tokens, with replacement; the block of a centre reaches from c // 2 cells before it to c - 1 - c // 2
    after it in time and in frequency, and coordinates are clamped into the grid one by one, so that blocks at an edge
    end there. All marks are returned, however many: their mean is 95.8 for 5 blocks of side 5 on 64 x 8 tokens, 35.0 for
    2 on 38 x 5. cwx-worst-one/EAT:utils/data_utils.py and facebookresearch/fairseq:fairseq/data/data_utils.py,
    compute_block_mask_2d, before cells are dropped or added. truncation and spare_first have no meaning here and keep
    their defaults.

    truncation "random": the marks are returned as they are; the surplus is for select_tokens to drop,
    uniformly. truncation "first": only the first n_marked marks in token order stay (both references).

    stream: in [0, 2^31), tells apart the masks that one step draws of a clip.

    Words: purpose MASK_SHAPE, stream 2 s word 0 for the side, stream 2 s + 1 for the starts, s being `stream`;
    id 0 when shared, which needs clips of equal counts. Ties between starts go to the lower one. Centre k of a clip of n
    tokens is word k * n / 2^32 of stream 2 s + 1, counted time outer in both orders. No host sync. Raises TypeError or
    ValueError for a wrong dtype, shape, device, count or choice.
    """
    op = "block_marks"
    check_counts(op, "n_tokens", n_tokens)
    check_choice(op, "growth", growth, ("clipped", "wrap", "clamped"))
    check_at_least(op, "freq", freq, 1)
    for clip, tokens in enumerate(n_tokens):
        if tokens % freq:
            raise ValueError(
                f"{op}: n_tokens must be multiples of freq = {freq}, received {tokens} for clip {clip}."
            )
    check_tensor(op, "cu_tokens", cu_tokens, (torch.int32,), (len(n_tokens) + 1,))
    check_draw(op, counter, clip_ids, len(n_tokens))
    check_choice(op, "order", order, ("time", "freq"))
    check_choice(op, "truncation", truncation, ("random", "first"))
    if not isinstance(sides, tuple) or not sides:
        raise TypeError(f"{op}: sides must be a tuple of at least one int, received {sides!r:.80}.")
    for side in sides:
        check_at_least(op, "each of sides", side, 1)
    check_below(op, "stream", stream, 1 << 31)
    check_devices(op, cu_tokens=cu_tokens, counter=counter, clip_ids=clip_ids)
    if growth == "clamped":
        _check_clamped(op, n_tokens, n_marked, blocks, sides, truncation, spare_first)
        assert blocks is not None
        if shared:
            check_shared(op, n_tokens=n_tokens, blocks=blocks)
        choice = choose(op, CLAMPED, cu_tokens, n_tokens, request=implementation)
        return choice.function(
            cu_tokens,
            n_tokens,
            blocks,
            counter,
            clip_ids,
            freq=freq,
            order=order,
            side=sides[0],
            shared=shared,
            stream=stream,
        )
    _check_marked(op, n_tokens, n_marked, blocks, growth)
    assert n_marked is not None
    if shared:
        check_shared(op, n_tokens=n_tokens, n_marked=n_marked)
    choice = choose(op, IMPLEMENTATIONS, cu_tokens, n_tokens, request=implementation)
    return choice.function(
        cu_tokens,
        n_tokens,
        n_marked,
        counter,
        clip_ids,
        freq=freq,
        order=order,
        sides=sides,
        growth=growth,
        truncation=truncation,
        spare_first=spare_first,
        shared=shared,
        stream=stream,
    )


def _check_marked(op: str, n_tokens: tuple[int, ...], n_marked: object, blocks: object, growth: str) -> None:
    if blocks is not None:
        raise ValueError(
            f'{op}: growth "{growth}" places blocks until n_marked is exceeded, so blocks must be None; received '
            f"{blocks!r:.80}."
        )
    check_counts(op, "n_marked", n_marked, len(n_tokens))
    assert isinstance(n_marked, tuple)
    for clip, (marked, tokens) in enumerate(zip(n_marked, n_tokens, strict=True)):
        if marked > tokens:
            raise ValueError(
                f"{op}: n_marked must be at most the {tokens} tokens of clip {clip}, received {marked}."
            )


def _check_clamped(
    op: str,
    n_tokens: tuple[int, ...],
    n_marked: object,
    blocks: object,
    sides: tuple[int, ...],
    truncation: str,
    spare_first: bool,
) -> None:
    check_counts(op, "blocks", blocks, len(n_tokens))
    if len(sides) != 1:
        raise ValueError(f'{op}: growth "clamped" takes one side, received {sides!r:.80}.')
    for name, value, default in (
        ("n_marked", n_marked, None),
        ("truncation", truncation, "random"),
        ("spare_first", spare_first, False),
    ):
        if value != default:
            raise ValueError(
                f'{op}: growth "clamped" returns all marks of its blocks, so {name} must be {default!r}; received '
                f"{value!r:.80}."
            )
