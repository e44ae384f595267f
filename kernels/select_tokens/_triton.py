# SPDX-License-Identifier: Apache-2.0
"""select_tokens in Triton: one program draws, selects and writes a clip, and no key leaves it.

Selection needs no sort. The n-th smallest key is found bit by bit from the top, each bit by one count; the keys below
it are chosen, and of those equal to it as many as are missing, lower tokens first. That is exact, in as many counts as
keys have bits (33 to 63). Not yet measured on a GPU. Output: that of the reference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._triton import block_of, jit, load_key, on, philox_4x32, tl, words_of
from masktrain.kernels.philox.reference import Purpose
from masktrain.kernels.select_tokens.reference import KEY_BITS, LOG2

# Tokens of a clip at most: their keys are held in registers.
MOST_TOKENS = 16384
# Bits of a class, by dtype: classes lie in [0, 2^30).
CLASS_BITS = {torch.uint8: 8, torch.int32: 30, torch.int64: 30}

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "select_tokens_triton(Tensor cu_tokens, SymInt[] n_tokens, SymInt[] n_visible, Tensor counter, Tensor clip_ids, "
    "Tensor? classes, Tensor? scores, bool sample, bool shared, SymInt stream) -> (Tensor, Tensor)"
)


def why_not(cu_tokens: Tensor, n_tokens: tuple[int, ...]) -> str | None:
    """Return None if Triton serves clips of so many tokens on the device of cu_tokens, else why not."""
    longest = max(n_tokens, default=0)
    if longest > MOST_TOKENS:
        return f"the Triton kernel takes clips of at most {MOST_TOKENS} tokens, not {longest}"
    return _triton.why_not(cu_tokens)


@jit
def smallest(key: tl.tensor, count: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Return the count-th smallest (from 1) of `key`, int64 in [0, 2^BITS); more than there are: 2^BITS - 1.

    The largest value that fewer than `count` keys lie below.
    """
    found = tl.zeros_like(count).to(tl.int64)
    for i in range(BITS):
        higher = found | (tl.full([], 1, tl.int64) << (BITS - 1 - i))
        below = tl.sum((key < higher).to(tl.int32), 0)
        found = tl.where(below < count, higher, found)
    return found


@jit
def log2_of_fraction(fraction: tl.tensor, table_ptr: tl.tensor) -> tl.tensor:
    """Return log2(1 + fraction / 2^32) in Q48, for int64 in [0, 2^32)."""
    piece = fraction >> 22
    low = tl.load(table_ptr + piece).to(tl.int64)
    high = tl.load(table_ptr + piece + 1).to(tl.int64)
    return (low << 22) + (high - low) * (fraction & 0x3FFFFF)


@jit
def log2_of(value: tl.tensor, table_ptr: tl.tensor) -> tl.tensor:
    """Return log2(value) in Q48, for int64 in [1, 2^62]."""
    exponent = tl.zeros_like(value) + 62
    for i in tl.static_range(6):
        small = value < (tl.full([], 1, tl.int64) << (63 - (32 >> i)))
        value = tl.where(small, value << (32 >> i), value)
        exponent = tl.where(small, exponent - (32 >> i), exponent)
    return (exponent << 48) + log2_of_fraction((value >> 30) & 0xFFFFFFFF, table_ptr)


@jit
def score_keys(bits: tl.tensor, word: tl.tensor, table_ptr: tl.tensor, SAMPLE: tl.constexpr) -> tl.tensor:
    """Return int64 keys in [0, 2^33) of the bits (int32) of scores, and of words (int64) if SAMPLE."""
    LOWEST: tl.constexpr = (127 - 40) << 23
    HIGHEST: tl.constexpr = (127 + 40) << 23
    INFINITY: tl.constexpr = 255 << 23
    bits = tl.where(bits > INFINITY, 0, bits).to(tl.int64)
    if SAMPLE:
        bits = tl.minimum(tl.maximum(bits, LOWEST), HIGHEST)
        weight = (((bits >> 23) - 127) << 48) + log2_of_fraction((bits & 0x7FFFFF) << 9, table_ptr)
        exponential = (tl.full([], 33, tl.int64) << 48) - log2_of(2 * word + 1, table_ptr)
        key = (weight - log2_of(exponential, table_ptr) + (tl.full([], 96, tl.int64) << 48)) >> 22
    else:
        key = tl.maximum(bits, 0)
    return key


@jit(do_not_specialize=["n_chosen", "stream"])
def select_tokens_kernel(
    chosen_ptr: tl.tensor,
    other_ptr: tl.tensor,
    cu_tokens_ptr: tl.tensor,
    cu_chosen_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    clip_ids_ptr: tl.tensor,
    classes_ptr: tl.tensor,
    score_bits_ptr: tl.tensor,
    table_ptr: tl.tensor,
    n_chosen: tl.tensor,
    stream: tl.tensor,
    PURPOSE: tl.constexpr,
    EQUAL: tl.constexpr,
    SHARED: tl.constexpr,
    CLASS_BITS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    SCORES: tl.constexpr,
    SAMPLE: tl.constexpr,
    LENGTH: tl.constexpr,
) -> None:
    """Program b chooses n_chosen tokens of clip b (EQUAL), else cu_chosen[b + 1] - cu_chosen[b]: those of the smallest
    keys, or with SCORES those of the largest. CLASS_BITS: 0 without classes."""
    BITS: tl.constexpr = KEY_BITS + CLASS_BITS
    clip = tl.program_id(0)
    start = tl.load(cu_tokens_ptr + clip)
    n_tokens = tl.load(cu_tokens_ptr + clip + 1) - start
    if EQUAL:
        first = clip * n_chosen
        wanted = n_chosen
    else:
        first = tl.load(cu_chosen_ptr + clip)
        wanted = tl.load(cu_chosen_ptr + clip + 1) - first

    token = tl.arange(0, LENGTH)
    exists = token < n_tokens
    if SAMPLE:
        k0, k1, step = load_key(counter_ptr, PURPOSE)
        clip_id = tl.load(clip_ids_ptr + clip)
        if SHARED:
            clip_id = tl.zeros_like(clip_id)
        blocks = tl.arange(0, LENGTH // 4).to(tl.uint32)
        w0, w1, w2, w3 = philox_4x32(blocks, stream.to(tl.uint32), clip_id.to(tl.uint32), step, k0, k1)
        key = words_of(w0, w1, w2, w3).to(tl.int64)
    else:
        key = tl.zeros([LENGTH], tl.int64)
    if SCORES:
        bits = tl.load(score_bits_ptr + start + token, mask=exists, other=0)
        key = score_keys(bits, key, table_ptr, SAMPLE)
    if CLASS_BITS:
        key += tl.load(classes_ptr + start + token, mask=exists, other=0).to(tl.int64) << KEY_BITS
    if SCORES:
        # Turned round: ties go to the lower token again.
        key = 0x7FFFFFFFFFFFFFFF >> (63 - BITS) ^ key
    # Beyond every key that exists, so that it is counted in no case.
    key = tl.where(exists, key, 0x7FFFFFFFFFFFFFFF)

    last = smallest(key, wanted, BITS)
    under = key < last
    equal = key == last
    missing = wanted - tl.sum(under.to(tl.int32), 0)
    chosen = under | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
    # So many chosen tokens up to and with this one.
    rank = tl.cumsum(chosen.to(tl.int32), 0)
    tl.store(chosen_ptr + first + rank - 1, start + token, mask=chosen)
    tl.store(other_ptr + (start - first) + token - rank, start + token, mask=exists & (chosen == 0))


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Return `values` as int32 on `device`, without waiting for it.

    Not from pinned memory: torch refuses this copy while a CUDA graph is captured, and a graph that read these values
    from the host again would replay them for ever.
    """
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


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
    return torch.ops.masktrain.select_tokens_triton(
        cu_tokens, n_tokens, n_visible, counter, clip_ids, classes, scores, sample, shared, stream
    )


_log2: dict[torch.device, Tensor] = {}


def log2_table(device: torch.device) -> Tensor:
    """Return LOG2 on `device`, which is copied there once."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and device not in _log2:
        # What is allocated here belongs to the graph.
        return LOG2.to(device, non_blocking=True)
    if device not in _log2:
        _log2[device] = LOG2.to(device, non_blocking=True)
    return _log2[device]


@torch.library.impl(_library, "select_tokens_triton", "CompositeExplicitAutograd")
def _select_tokens(
    cu_tokens: Tensor,
    n_tokens: Sequence[int],
    n_visible: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    classes: Tensor | None,
    scores: Tensor | None,
    sample: bool,
    shared: bool,
    stream: int,
) -> tuple[Tensor, Tensor]:
    visible = cu_tokens.new_empty(sum(n_visible))
    masked = cu_tokens.new_empty(sum(n_tokens) - sum(n_visible))
    if sum(n_tokens):
        cu_tokens, counter, clip_ids = (t.contiguous() for t in (cu_tokens, counter, clip_ids))
        n_chosen, outputs = list(n_visible), (visible, masked)
        if scores is not None:
            n_chosen, outputs = [n - v for n, v in zip(n_tokens, n_visible, strict=True)], (masked, visible)
        equal = len(set(n_chosen)) == 1
        with on(cu_tokens):
            length = block_of(max(n_tokens), least=4)
            select_tokens_kernel[(len(n_tokens),)](
                *outputs,
                cu_tokens,
                # Read only where the counts differ; likewise classes, scores and table only where there are scores.
                cu_tokens if equal else to_device([0, *accumulate(n_chosen)], cu_tokens.device),
                counter,
                clip_ids,
                cu_tokens if classes is None else classes.contiguous(),
                cu_tokens if scores is None else scores.contiguous().view(torch.int32),
                cu_tokens if scores is None else log2_table(cu_tokens.device),
                n_chosen[0],
                stream,
                PURPOSE=int(Purpose.MASK),
                EQUAL=equal,
                SHARED=shared,
                CLASS_BITS=0 if classes is None else CLASS_BITS[classes.dtype],
                KEY_BITS=32 if scores is None else KEY_BITS,
                SCORES=scores is not None,
                SAMPLE=sample,
                LENGTH=length,
                num_warps=block_of(length // 512, least=4, most=16),
            )
    return visible, masked


@torch.library.register_fake("masktrain::select_tokens_triton", lib=_library)
def _select_tokens_fake(
    cu_tokens: Tensor, n_tokens: Sequence[int], n_visible: Sequence[int], *_: object
) -> tuple[Tensor, Tensor]:
    return cu_tokens.new_empty(sum(n_visible)), cu_tokens.new_empty(sum(n_tokens) - sum(n_visible))
