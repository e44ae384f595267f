# SPDX-License-Identifier: Apache-2.0
"""The native block_marks gives the marks of the reference."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.block_marks import block_marks

pytestmark = pytest.mark.skipif(_native.cpu() is None, reason="no native library")

COUNTER = torch.tensor([0x1234_5678_9ABC, 3])


def both(n_tokens: list[int], n_marked: list[int] | None, **options: Any) -> tuple[Tensor, Tensor]:
    cu = torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32)
    marked = None if n_marked is None else tuple(n_marked)
    arguments = (cu, tuple(n_tokens), marked, COUNTER, torch.arange(len(n_tokens)) * 12_345_678_901)
    with poisoned_memory():
        native = block_marks(*arguments, **options, implementation="native")
    return native, block_marks(*arguments, **options, implementation="reference")


def assert_equal(results: tuple[Tensor, Tensor]) -> None:
    assert results[0].dtype == torch.uint8
    assert torch.equal(*results)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], dict[str, Any]]:
    freq = draw(st.integers(1, 9))
    n_tokens = [freq * draw(st.integers(0, 20)) for _ in range(draw(st.integers(0, 5)))]
    n_marked = [draw(st.sampled_from([0, n, n // 2, n * 3 // 4, max(0, n - 1)])) for n in n_tokens]
    options = {
        "freq": freq,
        "order": draw(st.sampled_from(["time", "freq"])),
        "sides": tuple(draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))),
        "growth": draw(st.sampled_from(["clipped", "wrap"])),
        "truncation": draw(st.sampled_from(["random", "first"])),
        "spare_first": draw(st.booleans()),
    }
    return n_tokens, n_marked, options


@given(batches())
@settings(max_examples=300, deadline=None)
def test_equals_the_reference(batch: tuple[list[int], list[int], dict[str, Any]]) -> None:
    n_tokens, n_marked, options = batch
    assert_equal(both(n_tokens, n_marked, **options))


@pytest.mark.parametrize("growth", ["clipped", "wrap"])
@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("sides", [(1,), (3, 4, 5), (40, 2)])
def test_every_instruction_set(growth: str, order: str, sides: tuple[int, ...], level: int) -> None:
    n_tokens = [8, 512, 0, 496, 24, 800, 8]
    for share in (0.0, 0.3, 0.75, 1.0):
        marked = [int(n * share) for n in n_tokens]
        assert_equal(both(n_tokens, marked, freq=8, order=order, sides=sides, growth=growth))


def test_one_row_of_long_clips(level: int) -> None:
    assert_equal(both([500, 1, 3], [300, 1, 1], freq=1, order="time", growth="wrap", spare_first=True))


@pytest.mark.parametrize("growth", ["clipped", "wrap"])
def test_many_starts_are_sorted_in_several_parts(growth: str, level: int) -> None:
    for share in (0.5, 0.97, 1.0):
        n_tokens = [24_000, 8, 1600]
        marked = [int(n * share) for n in n_tokens]
        assert_equal(both(n_tokens, marked, freq=8, order="freq", sides=(2, 6), growth=growth))


def test_threads(threads: int) -> None:
    assert_equal(both([512] * 80 + [8], [384] * 80 + [3], freq=8, order="time"))


def test_shared() -> None:
    assert_equal(both([96] * 5, [40] * 5, freq=8, order="freq", shared=True))


@pytest.mark.parametrize("n_tokens", [[], [0], [0, 0]])
def test_nothing(n_tokens: list[int]) -> None:
    assert_equal(both(n_tokens, n_tokens, freq=8, order="time"))


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), max_size=5),
    st.integers(1, 12),
    st.sampled_from(["time", "freq"]),
)
@settings(max_examples=200, deadline=None)
def test_clamped_equals_the_reference(freq: int, clips: list[tuple[int, int]], side: int, order: str) -> None:
    n_tokens, blocks = [freq * columns for columns, _ in clips], tuple(k for _, k in clips)
    assert_equal(both(n_tokens, None, freq=freq, order=order, growth="clamped", blocks=blocks, sides=(side,)))


@pytest.mark.parametrize("order", ["time", "freq"])
def test_clamped_by_every_instruction_set(order: str, level: int) -> None:
    """More centres than words are made at a time, too."""
    n_tokens = [8, 24_000, 0, 496, 512]
    options = {"freq": 8, "order": order, "growth": "clamped", "blocks": (0, 700, 3, 5, 513)}
    for side in (1, 5, 40):
        assert_equal(both(n_tokens, None, sides=(side,), **options))


def test_clamped_threads(threads: int) -> None:
    blocks = (5,) * 150 + (2,)
    assert_equal(
        both([512] * 150 + [8], None, freq=8, order="time", growth="clamped", blocks=blocks, sides=(5,))
    )


@pytest.mark.parametrize("n_tokens", [[], [0], [0, 0]])
def test_clamped_nothing(n_tokens: list[int]) -> None:
    options = {"freq": 8, "order": "time", "growth": "clamped", "sides": (5,)}
    assert_equal(both(n_tokens, None, blocks=(2,) * len(n_tokens), **options))


def test_opcheck() -> None:
    arguments = ((8, 16), (3, 4), COUNTER, torch.arange(2), 4, True, (2, 3), True, False, False, False, 1)
    torch.library.opcheck(torch.ops.masktrain.block_marks.default, arguments)
    arguments = ((8, 16), (3, 4), COUNTER, torch.arange(2), 4, True, 3, False, 1)
    torch.library.opcheck(torch.ops.masktrain.clamped_blocks.default, arguments)
