# SPDX-License-Identifier: Apache-2.0
"""The order of the clips is a pure function, and the shards of all ranks make up each batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.data.order import batch_indices, check_shards, clip_at, order
from masktrain.errors import ConfigError
from masktrain.kernels.philox import Purpose, host_words


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**48 - 1), epoch=st.integers(0, 2**32 - 1), n=st.integers(1, 300))
def test_order_is_the_sort_by_word_and_index(seed: int, epoch: int, n: int) -> None:
    words = host_words(seed, epoch, 0, n, purpose=Purpose.ORDER)
    expected = sorted(range(n), key=lambda i: (words[i], i))
    assert order(seed, epoch, n).tolist() == expected


def test_order_is_pure_and_cannot_be_changed() -> None:
    first = order(7, 3, 1000).copy()
    for epoch in range(10):
        order(7, epoch, 1000)
    np.testing.assert_array_equal(order(7, 3, 1000), first)
    assert order(7, 3, 1000).dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        order(7, 3, 1000)[0] = 5


def test_order_differs_by_seed_and_epoch() -> None:
    orders = {order(seed, epoch, 100).tobytes() for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_order_is_uniform() -> None:
    """Each clip stands at each place equally often: chi-squared with 9 degrees of freedom."""
    runs = 2000
    counts = np.zeros((4, 4))
    for epoch in range(runs):
        counts[np.arange(4), order(0, epoch, 4)] += 1
    expected = runs / 4
    assert ((counts - expected) ** 2 / expected).sum() < 33.7  # exceeded by chance once in 10^4


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 1000), n=st.integers(1, 40), epochs=st.integers(1, 3))
def test_each_epoch_holds_each_clip_once(seed: int, n: int, epochs: int) -> None:
    drawn = [clip_at(seed, index, n) for index in range(epochs * n)]
    assert Counter(drawn) == Counter((epoch, clip) for epoch in range(epochs) for clip in range(n))
    assert [epoch for epoch, _ in drawn] == sorted(epoch for epoch, _ in drawn)


@settings(deadline=None)
@given(
    micro=st.integers(1, 5),
    world=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    step=st.integers(0, 10**6),
)
def test_shards_of_all_ranks_make_up_the_batch(micro: int, world: int, accumulation: int, step: int) -> None:
    size = micro * world * accumulation
    check_shards(size, world, accumulation)
    parts = [batch_indices(step, size, rank, world, accumulation) for rank in range(world)]
    assert [len(p) for rank in parts for p in rank] == [micro] * (world * accumulation)
    assert [i for rank in parts for p in rank for i in p] == list(range(step * size, (step + 1) * size))


@pytest.mark.parametrize(
    ("size", "world", "accumulation", "named"),
    [(10, 4, 2, "8 or 16"), (3, 4, 1, "nearest 4"), (0, 1, 1, "nearest 1"), (33, 2, 1, "32 or 34")],
)
def test_a_batch_that_does_not_divide_is_refused(
    size: int, world: int, accumulation: int, named: str
) -> None:
    with pytest.raises(ConfigError, match="batch_size") as caught:
        check_shards(size, world, accumulation)
    assert named in str(caught.value)
