# SPDX-License-Identifier: Apache-2.0
"""block_marks by the native library, as one torch op: the bits of the reference."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels.select_tokens._native import why_not as why_not

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "block_marks(SymInt[] n_tokens, SymInt[] n_marked, Tensor counter, Tensor clip_ids, SymInt freq, "
    "bool by_time, SymInt[] sides, bool clipped, bool only_first, bool spare_first, bool shared, "
    "SymInt stream) -> Tensor"
)
_library.define(
    "clamped_blocks(SymInt[] n_tokens, SymInt[] blocks, Tensor counter, Tensor clip_ids, SymInt freq, bool by_time, "
    "SymInt side, bool shared, SymInt stream) -> Tensor"
)


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
    """See op.py. The counts say where a clip lies; cu_tokens repeats them and is not read."""
    return torch.ops.masktrain.block_marks(
        n_tokens,
        n_marked,
        counter,
        clip_ids,
        freq,
        order == "time",
        sides,
        growth == "clipped",
        truncation == "first",
        spare_first,
        shared,
        stream,
    )


@torch.library.impl(_library, "block_marks", "CPU")
def _block_marks(
    n_tokens: Sequence[int],
    n_marked: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    freq: int,
    by_time: bool,
    sides: Sequence[int],
    clipped: bool,
    only_first: bool,
    spare_first: bool,
    shared: bool,
    stream: int,
) -> Tensor:
    counter, clip_ids = counter.contiguous(), clip_ids.contiguous()
    # Arrays: a tensor of a few numbers takes longer to make than to use.
    cu_tokens, marked, draws = (array("q", v) for v in ([0, *accumulate(n_tokens)], n_marked, sides))
    out = torch.empty(sum(n_tokens), dtype=torch.uint8)
    threads, border, longest = _native.threads(), max(sides) - 1, max(n_tokens, default=0)
    room = 32 + ((longest // freq + border) * (freq + border) if clipped else longest)
    workspace = torch.empty(threads * 3 * room, dtype=torch.int64)
    _native.require().mt_block_marks(
        out.data_ptr(),
        cu_tokens.buffer_info()[0],
        marked.buffer_info()[0],
        len(n_tokens),
        counter.data_ptr(),
        clip_ids.data_ptr(),
        freq,
        by_time,
        draws.buffer_info()[0],
        len(sides),
        clipped,
        only_first,
        spare_first,
        stream,
        shared,
        workspace.data_ptr(),
        room,
        threads,
    )
    return out


@torch.library.register_fake("masktrain::block_marks", lib=_library)
def _block_marks_fake(
    n_tokens: Sequence[int], n_marked: Sequence[int], counter: Tensor, *_: object
) -> Tensor:
    return counter.new_empty(sum(n_tokens), dtype=torch.uint8)


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
    """See reference.py. The counts say where a clip lies; cu_tokens repeats them and is not read."""
    return torch.ops.masktrain.clamped_blocks(
        n_tokens, blocks, counter, clip_ids, freq, order == "time", side, shared, stream
    )


@torch.library.impl(_library, "clamped_blocks", "CPU")
def _clamped_blocks(
    n_tokens: Sequence[int],
    blocks: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    freq: int,
    by_time: bool,
    side: int,
    shared: bool,
    stream: int,
) -> Tensor:
    counter, clip_ids = counter.contiguous(), clip_ids.contiguous()
    cu_tokens, counts = (array("q", v) for v in ([0, *accumulate(n_tokens)], blocks))
    out = torch.empty(sum(n_tokens), dtype=torch.uint8)
    _native.require().mt_clamped_blocks(
        out.data_ptr(),
        cu_tokens.buffer_info()[0],
        counts.buffer_info()[0],
        len(n_tokens),
        counter.data_ptr(),
        clip_ids.data_ptr(),
        freq,
        by_time,
        side,
        stream,
        shared,
        _native.threads(),
    )
    return out


@torch.library.register_fake("masktrain::clamped_blocks", lib=_library)
def _clamped_blocks_fake(
    n_tokens: Sequence[int], blocks: Sequence[int], counter: Tensor, *_: object
) -> Tensor:
    return counter.new_empty(sum(n_tokens), dtype=torch.uint8)
