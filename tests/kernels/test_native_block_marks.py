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


def both(n_tokens: list[int], n_marked: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    cu = torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32)
    arguments = (cu, tuple(n_tokens), tuple(n_marked), COUNTER, torch.arange(len(n_tokens)) * 12_345_678_901)
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


def test_opcheck() -> None:
    arguments = ((8, 16), (3, 4), COUNTER, torch.arange(2), 4, True, (2, 3), True, False, False, False, 1)
    torch.library.opcheck(torch.ops.masktrain.block_marks.default, arguments)
