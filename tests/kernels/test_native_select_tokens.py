# SPDX-License-Identifier: Apache-2.0
"""The native select_tokens chooses the tokens of the reference: equal words, skewed classes, clips of every size."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.philox import Purpose, philox_words
from masktrain.kernels.select_tokens import select_tokens

pytestmark = pytest.mark.skipif(_native.cpu() is None, reason="no native library")

COUNTER = torch.tensor([0x1234_5678_9ABC, 3])


def both(
    n_tokens: list[int], n_visible: list[int], *, classes: Tensor | None = None, shared: bool = False
) -> list[tuple[Tensor, Tensor]]:
    cu = torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32)
    ids = torch.arange(len(n_tokens)) * 12_345_678_901
    arguments = (cu, tuple(n_tokens), tuple(n_visible), COUNTER, ids)
    results = []
    for implementation in ("native", "reference"):
        with poisoned_memory():
            results.append(
                select_tokens(*arguments, classes=classes, shared=shared, implementation=implementation)
            )
    return results


def assert_equal(results: list[tuple[Tensor, Tensor]]) -> None:
    native, reference = results
    assert all(t.dtype == torch.int32 for t in native)
    assert all(map(torch.equal, native, reference))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], Tensor | None]:
    n_tokens = draw(st.lists(st.integers(0, 150), max_size=6))
    n_visible = [draw(st.integers(0, n)) for n in n_tokens]
    dtype = draw(st.sampled_from([None, torch.uint8, torch.int32, torch.int64]))
    if dtype is None:
        return n_tokens, n_visible, None
    top = draw(st.sampled_from([1, 2, 5, 255] if dtype == torch.uint8 else [1, 3, 2**30]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return n_tokens, n_visible, torch.randint(0, top, (sum(n_tokens),), generator=g).to(dtype)


@given(batches())
@settings(max_examples=200, deadline=None)
def test_equals_the_reference(batch: tuple[list[int], list[int], Tensor | None]) -> None:
    n_tokens, n_visible, classes = batch
    assert_equal(both(n_tokens, n_visible, classes=classes))


SIZES = [0, 1, 2, 3, 4, 5, 23, 24, 25, 26, 31, 32, 33, 127, 128, 129, 512, 1000, 4097]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 0.99, 1.0])
def test_every_instruction_set(share: float, level: int) -> None:
    n_visible = [int(n * share) for n in SIZES]
    assert_equal(both(SIZES, n_visible))
    g = torch.Generator().manual_seed(level)
    assert_equal(both(SIZES, n_visible, classes=torch.randint(0, 2, (sum(SIZES),), generator=g)))


def test_threads(threads: int) -> None:
    assert_equal(both([512] * 130 + SIZES, [100] * 130 + [n // 3 for n in SIZES]))


def test_equal_words_go_to_the_lower_token(level: int) -> None:
    """Among 300,000 words of 32 bits some are equal (expected: ten pairs); the cut is made between two of them."""
    n = 300_000
    words = philox_words(COUNTER, torch.zeros(1, dtype=torch.int64), n, purpose=Purpose.MASK)[0]
    ordered = words.sort(stable=True)
    pairs = (ordered.values[1:] == ordered.values[:-1]).nonzero()[:, 0].tolist()
    assert len(pairs) >= 3
    for rank in pairs[:3]:
        results = both([n], [rank + 1])
        assert_equal(results)
        visible = set(results[0][0].tolist())
        lower, upper = ordered.indices[rank : rank + 2].tolist()
        assert lower < upper and lower in visible and upper not in visible


def test_shared() -> None:
    assert_equal(both([77] * 5, [20] * 5, shared=True))


@pytest.mark.parametrize("n_tokens", [[], [0], [0, 0, 0], [1], [1, 1]])
def test_almost_nothing(n_tokens: list[int]) -> None:
    assert_equal(both(n_tokens, [0] * len(n_tokens)))
    assert_equal(both(n_tokens, n_tokens))


def test_opcheck() -> None:
    for classes in (None, torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8)):
        arguments = ((2, 3), (1, 2), COUNTER, torch.arange(2), classes, None, True, False, 1)
        torch.library.opcheck(torch.ops.masktrain.select_tokens.default, arguments)
