# SPDX-License-Identifier: Apache-2.0
"""block_marks in Triton: one program finds when each token of a clip is first covered, and how far the blocks go.

As in the reference, the marks are the tokens whose earliest block is no later than that of the token which exceeds the
count; that bound is found bit by bit, without a sort. A given number of blocks is simpler: each token looks at each centre. Not yet measured on a
GPU. Output: that of the reference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masktrain.kernels._triton import block_of, cdiv, jit, on, tl
from masktrain.kernels.block_marks.reference import streams
from masktrain.kernels.philox import Purpose
from masktrain.kernels.philox._triton import philox_words
from masktrain.kernels.select_tokens._triton import smallest, to_device

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "block_marks_triton(Tensor cu_tokens, SymInt[] n_tokens, SymInt[] n_marked, Tensor counter, Tensor clip_ids, "
    "SymInt freq, bool time_major, SymInt[] sides, bool wrap, bool first, bool spare_first, bool shared, SymInt stream) -> Tensor"
)
_library.define(
    "clamped_blocks_triton(Tensor cu_tokens, SymInt[] n_tokens, SymInt[] blocks, Tensor counter, Tensor clip_ids, "
    "SymInt freq, bool time_major, SymInt side, bool shared, SymInt stream) -> Tensor"
)


@jit(do_not_specialize=["n_marked", "row_step"])
def block_marks_kernel(
    out_ptr: tl.tensor,
    cu_tokens_ptr: tl.tensor,
    n_marked_ptr: tl.tensor,
    words_ptr: tl.tensor,
    side_words_ptr: tl.tensor,
    n_marked: tl.tensor,
    row_step: tl.tensor,
    SIDES: tl.constexpr,
    N_SIDES: tl.constexpr,
    FREQ: tl.constexpr,
    TIME_MAJOR: tl.constexpr,
    LARGEST: tl.constexpr,
    WRAP: tl.constexpr,
    FIRST: tl.constexpr,
    SPARE_FIRST: tl.constexpr,
    EQUAL: tl.constexpr,
    LENGTH: tl.constexpr,
) -> None:
    """Program b marks n_marked tokens of clip b (EQUAL), else n_marked_ptr[b].

    words: int64, a row of the words of all starts for each clip, row_step apart, or one row for all (row_step 0).
    side_words: (B,) int64, or one for all.
    """
    LAST: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    clip = tl.program_id(0)
    begin = tl.load(cu_tokens_ptr + clip)
    n_tokens = tl.load(cu_tokens_ptr + clip + 1) - begin
    wanted = n_marked if EQUAL else tl.load(n_marked_ptr + clip)
    columns = n_tokens // FREQ
    words_ptr += clip.to(tl.int64) * row_step
    side_word = tl.load(side_words_ptr + tl.where(row_step > 0, clip, 0))
    pick = (side_word * N_SIDES) >> 32
    side = tl.zeros_like(pick)
    for number in tl.static_range(N_SIDES):
        side = tl.where(pick == number, SIDES[number], side)

    # The start at the token itself; `down`: how much lower the start one row before is.
    token = tl.arange(0, LENGTH)
    exists = token < n_tokens
    if WRAP:
        start = token
        down = tl.full([], FREQ, tl.int32) if TIME_MAJOR else columns
    else:
        WIDTH: tl.constexpr = FREQ + LARGEST - 1
        if TIME_MAJOR:
            column, row = token // FREQ, token % FREQ
        else:
            row, column = token // tl.maximum(columns, 1), token % tl.maximum(columns, 1)
        start = (column + LARGEST - 1) * WIDTH + row + LARGEST - 1
        down = tl.full([], WIDTH, tl.int32)
    covered = tl.full([LENGTH], LAST, tl.int64)
    for i in range(LARGEST):
        for j in range(LARGEST):
            before = start - i * down - j
            holds = exists & (before >= 0) & (i < side) & (j < side)
            word = tl.load(words_ptr + before, mask=holds, other=0)
            covered = tl.minimum(covered, tl.where(holds, (word << 31) + before, LAST))
    if SPARE_FIRST:
        covered = tl.where(token == 0, LAST, covered)

    # Blocks are placed until the count is exceeded.
    last = smallest(covered, wanted + 1, 63)
    marks = ((covered <= last) & (covered < LAST)).to(tl.int32)
    if FIRST:
        marks = tl.where(tl.cumsum(marks, 0) <= wanted, marks, 0)
    tl.store(out_ptr + begin + token, marks.to(tl.uint8), mask=exists)


def block_marks(
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    n_marked: tuple[int, ...],
    counter: Tensor,
    clip_ids: Tensor,
    *,
    freq: int,
    order: str,
    sides: tuple[int, ...],
    growth: str,
    truncation: str,
    spare_first: bool,
    shared: bool,
    stream: int,
) -> Tensor:
    """See op.py."""
    return torch.ops.masktrain.block_marks_triton(
        cu_tokens,
        n_tokens,
        n_marked,
        counter,
        clip_ids,
        freq,
        order == "time",
        sides,
        growth == "wrap",
        truncation == "first",
        spare_first,
        shared,
        stream,
    )


@torch.library.impl(_library, "block_marks_triton", "CompositeExplicitAutograd")
def _block_marks(
    cu_tokens: Tensor,
    n_tokens: Sequence[int],
    n_marked: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    freq: int,
    time_major: bool,
    sides: Sequence[int],
    wrap: bool,
    first: bool,
    spare_first: bool,
    shared: bool,
    stream: int,
) -> Tensor:
    out = cu_tokens.new_empty(sum(n_tokens), dtype=torch.uint8)
    if sum(n_tokens):
        longest, largest = max(n_tokens), max(sides)
        n_starts = longest if wrap else (longest // freq + largest - 1) * (freq + largest - 1)
        draw_ids = clip_ids.new_zeros(1) if shared else clip_ids
        purpose = int(Purpose.MASK_SHAPE)
        side_stream, start_stream = streams(stream)
        words = philox_words(counter, draw_ids, n_starts, purpose=purpose, stream=start_stream)
        side_words = philox_words(counter, draw_ids, 1, purpose=purpose, stream=side_stream)
        equal = len(set(n_marked)) == 1
        length = block_of(longest)
        with on(cu_tokens):
            block_marks_kernel[(len(n_tokens),)](
                out,
                cu_tokens.contiguous(),
                # Read only where the counts differ.
                side_words if equal else to_device(n_marked, cu_tokens.device),
                words,
                side_words,
                n_marked[0],
                0 if shared else n_starts,
                SIDES=tuple(sides),
                N_SIDES=len(sides),
                FREQ=freq,
                TIME_MAJOR=time_major,
                LARGEST=largest,
                WRAP=wrap,
                FIRST=first,
                SPARE_FIRST=spare_first,
                EQUAL=equal,
                LENGTH=length,
                num_warps=block_of(length // 512, least=4, most=16),
            )
    return out


@torch.library.register_fake("masktrain::block_marks_triton", lib=_library)
def _block_marks_fake(
    cu_tokens: Tensor,
    n_tokens: Sequence[int],
    n_marked: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    freq: int,
    time_major: bool,
    sides: Sequence[int],
    wrap: bool,
    first: bool,
    spare_first: bool,
    shared: bool,
    stream: int,
) -> Tensor:
    return cu_tokens.new_empty(sum(n_tokens), dtype=torch.uint8)


@jit(do_not_specialize=["blocks", "row_step"])
def clamped_blocks_kernel(
    out_ptr: tl.tensor,
    cu_tokens_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    words_ptr: tl.tensor,
    blocks: tl.tensor,
    row_step: tl.tensor,
    SIDE: tl.constexpr,
    FREQ: tl.constexpr,
    TIME_MAJOR: tl.constexpr,
    EQUAL: tl.constexpr,
    LENGTH: tl.constexpr,
) -> None:
    """Program (b, i) marks tokens i LENGTH ... of clip b, which has `blocks` blocks (EQUAL), else blocks_ptr[b].

    words: int64, a row of the words of all centres for each clip, row_step apart, or one row for all (row_step 0).
    """
    BEFORE: tl.constexpr = SIDE // 2
    clip = tl.program_id(0)
    begin = tl.load(cu_tokens_ptr + clip)
    n_tokens = tl.load(cu_tokens_ptr + clip + 1) - begin
    count = blocks if EQUAL else tl.load(blocks_ptr + clip)
    columns = tl.maximum(n_tokens // FREQ, 1)
    words_ptr += clip.to(tl.int64) * row_step

    token = tl.program_id(1) * LENGTH + tl.arange(0, LENGTH)
    if TIME_MAJOR:
        column, row = token // FREQ, token % FREQ
    else:
        row, column = token // columns, token % columns
    marks = tl.zeros([LENGTH], tl.int32)
    for k in range(count):
        centre = ((tl.load(words_ptr + k) * n_tokens) >> 32).to(tl.int32)
        # Cells from the first column and row of the block, on the whole plane: the grid cuts what lies outside.
        i = column - (centre // FREQ - BEFORE)
        j = row - (centre % FREQ - BEFORE)
        marks |= ((i >= 0) & (i < SIDE) & (j >= 0) & (j < SIDE)).to(tl.int32)
    tl.store(out_ptr + begin + token, marks.to(tl.uint8), mask=token < n_tokens)


def clamped_blocks(
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    blocks: tuple[int, ...],
    counter: Tensor,
    clip_ids: Tensor,
    *,
    freq: int,
    order: str,
    side: int,
    shared: bool,
    stream: int,
) -> Tensor:
    """See reference.py."""
    return torch.ops.masktrain.clamped_blocks_triton(
        cu_tokens, n_tokens, blocks, counter, clip_ids, freq, order == "time", side, shared, stream
    )


@torch.library.impl(_library, "clamped_blocks_triton", "CompositeExplicitAutograd")
def _clamped_blocks(
    cu_tokens: Tensor,
    n_tokens: Sequence[int],
    blocks: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    freq: int,
    time_major: bool,
    side: int,
    shared: bool,
    stream: int,
) -> Tensor:
    out = cu_tokens.new_empty(sum(n_tokens), dtype=torch.uint8)
    if sum(n_tokens):
        longest, most = max(n_tokens), max(blocks)
        draw_ids = clip_ids.new_zeros(1) if shared else clip_ids
        words = philox_words(
            counter, draw_ids, most, purpose=int(Purpose.MASK_SHAPE), stream=streams(stream)[1]
        )
        equal = len(set(blocks)) == 1
        length = block_of(longest, most=1024)
        with on(cu_tokens):
            clamped_blocks_kernel[(len(n_tokens), cdiv(longest, length))](
                out,
                cu_tokens.contiguous(),
                # Read only where the counts differ.
                words if equal else to_device(blocks, cu_tokens.device),
                words,
                blocks[0],
                0 if shared else most,
                SIDE=side,
                FREQ=freq,
                TIME_MAJOR=time_major,
                EQUAL=equal,
                LENGTH=length,
                num_warps=4,
            )
    return out


@torch.library.register_fake("masktrain::clamped_blocks_triton", lib=_library)
def _clamped_blocks_fake(
    cu_tokens: Tensor, n_tokens: Sequence[int], blocks: Sequence[int], *_: object
) -> Tensor:
    return cu_tokens.new_empty(sum(n_tokens), dtype=torch.uint8)
