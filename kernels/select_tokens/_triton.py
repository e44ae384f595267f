# SPDX-License-Identifier: Apache-2.0
"""select_tokens in Triton: one program draws, selects and writes a clip, and no key leaves it.

Selection needs no sort. The n-th smallest key is found bit by bit from the top, each bit by one count; the keys below
it are visible, and of those equal to it as many as are missing, lower tokens first. That is exact, in as many counts as
keys have bits (32 to 62). Not yet measured on a GPU. Output: that of the reference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._triton import block_of, jit, load_key, on, philox_4x32, tl, words_of
from masktrain.kernels.philox.reference import Purpose

# Tokens of a clip at most: their keys are held in registers.
MOST_TOKENS = 16384
# Bits of a class, by dtype: classes lie in [0, 2^30).
CLASS_BITS = {torch.uint8: 8, torch.int32: 30, torch.int64: 30}

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "select_tokens_triton(Tensor cu_tokens, SymInt[] n_tokens, SymInt[] n_visible, Tensor counter, Tensor clip_ids, "
    "Tensor? classes, bool shared) -> (Tensor, Tensor)"
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


@jit(do_not_specialize=["n_visible"])
def select_tokens_kernel(
    visible_ptr: tl.tensor,
    masked_ptr: tl.tensor,
    cu_tokens_ptr: tl.tensor,
    cu_visible_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    clip_ids_ptr: tl.tensor,
    classes_ptr: tl.tensor,
    n_visible: tl.tensor,
    PURPOSE: tl.constexpr,
    EQUAL: tl.constexpr,
    SHARED: tl.constexpr,
    CLASSES: tl.constexpr,
    BITS: tl.constexpr,
    LENGTH: tl.constexpr,
) -> None:
    """Program b selects n_visible tokens of clip b (EQUAL), else cu_visible[b + 1] - cu_visible[b]."""
    clip = tl.program_id(0)
    start = tl.load(cu_tokens_ptr + clip)
    n_tokens = tl.load(cu_tokens_ptr + clip + 1) - start
    if EQUAL:
        first = clip * n_visible
        wanted = n_visible
    else:
        first = tl.load(cu_visible_ptr + clip)
        wanted = tl.load(cu_visible_ptr + clip + 1) - first

    k0, k1, step = load_key(counter_ptr, PURPOSE)
    clip_id = tl.load(clip_ids_ptr + clip)
    if SHARED:
        clip_id = tl.zeros_like(clip_id)
    blocks = tl.arange(0, LENGTH // 4).to(tl.uint32)
    w0, w1, w2, w3 = philox_4x32(blocks, tl.zeros_like(step), clip_id.to(tl.uint32), step, k0, k1)
    key = words_of(w0, w1, w2, w3).to(tl.int64)
    token = tl.arange(0, LENGTH)
    exists = token < n_tokens
    if CLASSES:
        key += tl.load(classes_ptr + start + token, mask=exists, other=0).to(tl.int64) << 32
    # Beyond every key that exists, so that it is counted in no case.
    key = tl.where(exists, key, 0x7FFFFFFFFFFFFFFF)

    last = smallest(key, wanted, BITS)
    under = key < last
    equal = key == last
    missing = wanted - tl.sum(under.to(tl.int32), 0)
    visible = under | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))
    # So many visible tokens up to and with this one.
    rank = tl.cumsum(visible.to(tl.int32), 0)
    tl.store(visible_ptr + first + rank - 1, start + token, mask=visible)
    tl.store(masked_ptr + (start - first) + token - rank, start + token, mask=exists & (visible == 0))


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
    shared: bool,
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    return torch.ops.masktrain.select_tokens_triton(
        cu_tokens, n_tokens, n_visible, counter, clip_ids, classes, shared
    )


@torch.library.impl(_library, "select_tokens_triton", "CompositeExplicitAutograd")
def _select_tokens(
    cu_tokens: Tensor,
    n_tokens: Sequence[int],
    n_visible: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    classes: Tensor | None,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    visible = cu_tokens.new_empty(sum(n_visible))
    masked = cu_tokens.new_empty(sum(n_tokens) - sum(n_visible))
    if sum(n_tokens):
        cu_tokens, counter, clip_ids = (t.contiguous() for t in (cu_tokens, counter, clip_ids))
        equal = len(set(n_visible)) == 1
        with on(cu_tokens):
            length = block_of(max(n_tokens), least=4)
            select_tokens_kernel[(len(n_tokens),)](
                visible,
                masked,
                cu_tokens,
                # Read only where the counts differ.
                cu_tokens if equal else to_device([0, *accumulate(n_visible)], cu_tokens.device),
                counter,
                clip_ids,
                cu_tokens if classes is None else classes.contiguous(),
                n_visible[0],
                PURPOSE=int(Purpose.MASK),
                EQUAL=equal,
                SHARED=shared,
                CLASSES=classes is not None,
                BITS=32 + (0 if classes is None else CLASS_BITS[classes.dtype]),
                LENGTH=length,
                num_warps=block_of(length // 512, least=4, most=16),
            )
    return visible, masked


@torch.library.register_fake("masktrain::select_tokens_triton", lib=_library)
def _select_tokens_fake(
    cu_tokens: Tensor,
    n_tokens: Sequence[int],
    n_visible: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    classes: Tensor | None,
    shared: bool,
) -> tuple[Tensor, Tensor]:
    return cu_tokens.new_empty(sum(n_visible)), cu_tokens.new_empty(sum(n_tokens) - sum(n_visible))
