# SPDX-License-Identifier: Apache-2.0
"""Philox 4x32-10 in plain PyTorch and in plain Python: the definition of every random word.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The constants and the
published test vectors are those of DEShawResearch/random123:include/Random123/philox.h.

Words live in int64. A 32 x 32 bit product does not fit there, so each multiplier is split into two 16-bit
halves: no intermediate reaches 2^49.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW32 = 0xFFFFFFFF
LOW16 = 0xFFFF


class Purpose(IntEnum):
    """What a random word decides. Part of the key, so that no two uses ever share a word."""

    ORDER = 1
    CROP = 2
    REPLACE = 3
    MASK = 4
    MASK_SHAPE = 5
    DROPOUT = 6
    ATTENTION_DROPOUT = 7
    LAYERDROP = 8
    INIT = 9
    DEMO = 10
    FRAME_CROP = 11
    BASELINE = 12
    AUGMENT = 13
    MEL_JITTER = 14


def key_words(seed: Any, purpose: int) -> tuple[Any, Any]:
    """Return the two key words of `seed` (int or int64 tensor, in [0, 2^48)) and `purpose` (16 bits)."""
    return seed & LOW32, ((purpose & LOW16) << 16) | ((seed >> 32) & LOW16)


def philox_4x32(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> tuple[Any, Any, Any, Any]:
    """Return the four words of one Philox 4x32-10 block.

    Counter words `c0..c3` and key words `k0, k1`: ints or int64 tensors that broadcast, values in [0, 2^32).
    The same for the results. Python ints and tensors go through the same lines.
    """
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, MULTIPLIERS[0])
        high1, low1 = _product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + KEY_STEPS[0]) & LOW32
        k1 = (k1 + KEY_STEPS[1]) & LOW32
    return c0, c1, c2, c3


def _product(word: Any, multiplier: int) -> tuple[Any, Any]:
    """Return the high and the low 32 bits of word * multiplier."""
    upper = word * (multiplier >> 16)
    lower = word * (multiplier & LOW16)
    return (upper + (lower >> 16)) >> 16, (((upper & LOW16) << 16) + lower) & LOW32


def philox_blocks(
    counter: Tensor, ids: Tensor, blocks: Tensor, *, purpose: int, stream: int | Tensor
) -> Tensor:
    """Return the words of chosen blocks.

    counter: (2,) int64 [seed, step]. ids, blocks, stream: int64 that broadcast to some shape S (stream may be
    an int); only their low 32 bits count. Returns S + (4,) int64.
    """
    k0, k1 = key_words(counter[0], purpose)
    words = philox_4x32(blocks & LOW32, stream & LOW32, ids & LOW32, counter[1] & LOW32, k0, k1)
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def philox_words(counter: Tensor, ids: Tensor, n: int, *, purpose: int, stream: int = 0) -> Tensor:
    """Return the first `n` words of the stream of each id: (R, n) int64. See `op.philox_words`."""
    blocks = torch.arange((n + 3) // 4, device=ids.device)
    words = philox_blocks(counter, ids[:, None], blocks, purpose=purpose, stream=stream)
    return words.flatten(1)[:, :n]


def host_words(seed: int, step: int, id: int, n: int, *, purpose: int, stream: int = 0) -> list[int]:
    """Return the first `n` words of one stream as plain ints, for choices that are made on the host.

    Equal to row 0 of `philox_words(torch.tensor([seed, step]), torch.tensor([id]), n, ...)`.
    """
    k0, k1 = key_words(seed, purpose)
    words: list[int] = []
    for block in range((n + 3) // 4):
        words += philox_4x32(block & LOW32, stream & LOW32, id & LOW32, step & LOW32, k0, k1)
    return words[:n]
