# SPDX-License-Identifier: Apache-2.0
"""The definition of block_marks in plain PyTorch.

`block_marks` marks until a count is exceeded. Blocks are placed one after another until enough tokens are marked. A block whose start was drawn before marks
nothing new, so the order of the FIRST draws of all starts decides everything, and that is a uniform
permutation: the starts in ascending order of one random key each. The time at which a token is first covered
is then the smallest key among the starts whose block holds it, and the marks are the tokens covered no later
than the block that exceeds the count: the same distribution as the loop, for all clips and tokens at once.

`clamped_blocks` marks a given number of blocks. A coordinate that is clamped lands on the border, which the block
reaches anyway: a clamped block is the block cut at the grid's edges.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels.philox import Purpose, philox_words
from masktrain.kernels.select_tokens.reference import LAST, per_clip, token_ids


def streams(stream: int) -> tuple[int, int]:
    """Return the Philox streams of the sides and of the starts."""
    return 2 * stream, 2 * stream + 1


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
    total, longest, largest = sum(n_tokens), max(n_tokens, default=0), max(sides)
    if total == 0:
        return cu_tokens.new_empty(0, dtype=torch.uint8)
    device = cu_tokens.device
    draw_ids = clip_ids.new_zeros(1) if shared else clip_ids
    side_stream, start_stream = streams(stream)
    _, exists = token_ids(cu_tokens, longest)
    token = torch.arange(longest, device=device)
    columns = (cu_tokens[1:] - cu_tokens[:-1]).long()[:, None] // freq

    # start: the number of the start at the token itself; down: how much lower the start one row before is.
    if growth == "wrap":
        n_starts, start = longest, token
        down = columns if order == "freq" else torch.full_like(columns, freq)
    else:
        # Starts may lie up to largest - 1 cells before the grid. They are numbered time outer in both orders:
        # a clip's words then depend on neither its neighbours nor its length.
        if order == "time":
            column, row = token // freq, token % freq
        else:
            row, column = token // columns.clamp(min=1), token % columns.clamp(min=1)
        width = freq + largest - 1
        n_starts = (longest // freq + largest - 1) * width
        start = (column + largest - 1) * width + row + largest - 1
        down = torch.full_like(columns, width)
    words = philox_words(counter, draw_ids, n_starts, purpose=Purpose.MASK_SHAPE, stream=start_stream)
    keys = (words << 31) + torch.arange(n_starts, device=device)
    side_word = philox_words(counter, draw_ids, 1, purpose=Purpose.MASK_SHAPE, stream=side_stream)
    pick = (side_word * len(sides)) >> 32
    side = torch.zeros_like(pick)
    for number, value in enumerate(sides):
        side = torch.where(pick == number, value, side)

    keys, start = keys.expand(len(n_tokens), -1), start.expand(len(n_tokens), -1)
    covered = torch.full_like(start, LAST)
    for i in range(largest):
        for j in range(largest):
            # Only cells past a clip's end can look past the last start.
            before = start - i * down - j
            holds = (i < side) & (j < side) & (before >= 0)
            key = keys.gather(1, before.clamp(0, n_starts - 1))
            covered = torch.where(holds, torch.minimum(covered, key), covered)
    if spare_first:
        covered[:, 0] = LAST
    covered = torch.where(exists, covered, LAST)

    wanted = per_clip(n_marked, device)
    by_time = covered.sort(dim=1).values
    if isinstance(wanted, int):
        last = by_time[:, min(wanted, longest - 1), None]
    else:
        last = by_time.gather(1, wanted.clamp(max=longest - 1))
    marks = (covered <= last) & (covered < LAST)
    if truncation == "first":
        marks &= marks.cumsum(1) <= wanted
    return _packed(marks.to(torch.uint8), cu_tokens, total)


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
    """Return the marks of `blocks` blocks per clip: growth "clamped" of op.py."""
    total, longest, most = sum(n_tokens), max(n_tokens, default=0), max(blocks, default=0)
    if total == 0 or most == 0:
        return cu_tokens.new_zeros(total, dtype=torch.uint8)
    device = cu_tokens.device
    draw_ids = clip_ids.new_zeros(1) if shared else clip_ids
    words = philox_words(
        counter, draw_ids, most, purpose=Purpose.MASK_SHAPE, stream=streams(stream)[1]
    ).expand(len(n_tokens), -1)
    n = (cu_tokens[1:] - cu_tokens[:-1]).long()[:, None]
    # Centres are numbered time outer in both orders, which then have the same blocks.
    centre = (words * n) >> 32
    drawn = (torch.arange(most, device=device) < per_clip(blocks, device)).expand_as(centre)

    columns = n // freq
    reach = torch.arange(side, device=device) - side // 2
    column = (centre // freq)[:, :, None, None] + reach[:, None]
    row = (centre % freq)[:, :, None, None] + reach
    token = column * freq + row if order == "time" else row * columns[:, :, None, None] + column
    inside = (column >= 0) & (column < columns[:, :, None, None]) & (row >= 0) & (row < freq)
    # What is cut off goes to a cell past the last.
    token = torch.where(inside & drawn[:, :, None, None], token, longest).flatten(1)
    marks = torch.zeros(len(n_tokens), longest + 1, dtype=torch.uint8, device=device).scatter_(1, token, 1)
    return _packed(marks[:, :longest], cu_tokens, total)


def _packed(padded: Tensor, cu_tokens: Tensor, total: int) -> Tensor:
    """Return the (N,) values of the tokens that exist, of (B, L)."""
    if padded.numel() == total:
        return padded.flatten()
    index = torch.arange(total, dtype=torch.int32, device=padded.device)
    clip = torch.searchsorted(cu_tokens, index, right=True) - 1
    return padded[clip, index - cu_tokens[clip]]
