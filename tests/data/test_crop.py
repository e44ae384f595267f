# SPDX-License-Identifier: Apache-2.0
"""Crops are exact integers, uniform over the file, and a pure function of seed, epoch and clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from masktrain.data.config import DataConfig
from masktrain.data.crop import crop_length, crop_start
from masktrain.errors import ConfigError


@given(
    seed=st.integers(0, 2**48 - 1),
    epoch=st.integers(0, 2**32 - 1),
    clip=st.integers(0, 2**32 - 1),
    samples=st.integers(1, 2**40),
    share=st.floats(0, 1),
)
def test_a_crop_lies_inside_and_is_drawn_the_same_twice(
    seed: int, epoch: int, clip: int, samples: int, share: float
) -> None:
    length = max(1, int(share * samples))
    start = crop_start(seed, epoch, clip, samples, length)
    assert 0 <= start <= samples - length
    assert start == crop_start(seed, epoch, clip, samples, length)


def test_a_whole_file_starts_at_its_beginning() -> None:
    assert {crop_start(1, epoch, 2, 500, 500) for epoch in range(20)} == {0}


def test_both_ends_are_reached() -> None:
    assert {crop_start(0, epoch, 0, 12, 10) for epoch in range(60)} == {0, 1, 2}


def test_starts_in_a_long_file_are_uniform_to_the_last_sample() -> None:
    """Two hours at 48 kHz: twenty parts equally often, and the low digits as well as the high ones."""
    samples, length, draws = 2 * 3600 * 48000, 480_000, 4000
    starts = np.array([crop_start(3, epoch, 9, samples, length) for epoch in range(draws)])
    for counts in (
        np.histogram(starts, bins=20, range=(0, samples - length + 1))[0],
        np.bincount(starts % 20, minlength=20),
    ):
        assert ((counts - draws / 20) ** 2 / (draws / 20)).sum() < 50.8  # 19 degrees, by chance once in 10^4


def test_crops_differ_by_seed_epoch_and_clip() -> None:
    starts = {crop_start(s, e, c, 10**9, 1) for s in range(4) for e in range(4) for c in range(4)}
    assert len(starts) == 64


@pytest.mark.parametrize(
    ("samples", "rate", "seconds", "length"),
    [(44100 * 5, 44100, 2.0, 88200), (800, 8000, 2.0, 800), (10**6, 11025, 0.1, 1102), (77, 8000, None, 77)],
)
def test_length_in_samples_of_the_file(samples: int, rate: int, seconds: float | None, length: int) -> None:
    assert crop_length(samples, rate, seconds) == length


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clip_seconds", 0.0),
        ("clip_seconds", -1.0),
        ("clip_seconds", float("nan")),
        ("clip_seconds", float("inf")),
        ("clip_seconds", 1e9),
        ("crop", "middle"),
        ("loader", "torchaudio"),
        ("workers", -1),
        ("workers", 257),
        ("prefetch", 0),
        ("padding", "zero"),
        ("padding", "reference"),
        ("target_length", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"data.{field}"):
        DataConfig(**{field: value})


def test_two_length_policies_at_once_are_refused() -> None:
    DataConfig(padding="reference", target_length=1024)
    DataConfig(crop_to_batch_min=True)
    with pytest.raises(ConfigError, match="crop_to_batch_min"):
        DataConfig(padding="reference", target_length=1024, crop_to_batch_min=True)
