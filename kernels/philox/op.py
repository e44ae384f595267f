# SPDX-License-Identifier: Apache-2.0
"""philox_words: random words as a function of (seed, purpose, stream, step, id, position)."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import check_at_least, check_devices, check_tensor
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked, why_not
from masktrain.kernels.philox import _native, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.philox_words, why_not, not_unasked),
    Implementation("native", _native.philox_words, _native.why_not),
    Implementation("reference", reference.philox_words, lambda *_: None),
)


def philox_words(
    counter: Tensor,
    ids: Tensor,
    n: int,
    *,
    purpose: int,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Return the first `n` random words of each id's stream.

    Word p of a stream is word p % 4 of Philox 4x32-10 block p // 4, with key words
    [seed & 0xffffffff, purpose << 16 | seed >> 32] and counter words [block, stream, id, step].

    counter: (2,) int64 [seed, step], seed in [0, 2^48), step in [0, 2^32): a tensor, so that a compiled or
    captured step draws anew when its content changes. ids: (R,) int64 on the device of counter, of which the
    low 32 bits count (clip ids). n: words of each row, at least 0. purpose: a `Purpose`. stream: in [0,
    2^32), tells apart several draws of one purpose.

    Returns (R, n) int64 on that device, words in [0, 2^32): the same bits everywhere.
    Raises TypeError or ValueError for an argument of a wrong type, shape, device or range.
    """
    op = "philox_words"
    check_tensor(op, "counter", counter, (torch.int64,), (2,))
    check_tensor(op, "ids", ids, (torch.int64,), ("R",))
    check_devices(op, ids=ids, counter=counter)
    check_at_least(op, "n", n, 0)
    check_below(op, "purpose", purpose, 1 << 16)
    check_below(op, "stream", stream, 1 << 32)
    choice = choose(op, IMPLEMENTATIONS, ids, request=implementation)
    return choice.function(counter, ids, n, purpose=int(purpose), stream=stream)


def uniform(
    counter: Tensor,
    ids: Tensor,
    n: int,
    *,
    purpose: int,
    stream: int = 0,
    implementation: str | None = None,
) -> Tensor:
    """Return (R, n) float64 in [0, 1): the words of `philox_words` times 2^-32, which is exact."""
    words = philox_words(counter, ids, n, purpose=purpose, stream=stream, implementation=implementation)
    return words.to(torch.float64) * 2.0**-32


def check_below(op: str, name: str, value: int, end: int) -> None:
    """Check that the host number `value` lies in [0, end)."""
    if not 0 <= value < end:
        raise ValueError(f"{op}: {name} must lie in [0, {end}), received {value!r}.")
