# SPDX-License-Identifier: Apache-2.0
"""Streaming statistics against numpy over the whole, and their warnings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.errors import DataError
from masktrain.frontend.stats import RunningStats, Statistics
from masktrain.types import Spectrogram, cumulative


def packed(frames: torch.Tensor) -> Spectrogram:
    n = (len(frames),)
    return Spectrogram(frames, n, cumulative(n, torch.int64, "cpu"), torch.zeros(1, dtype=torch.int64))


def logs(n: int, seed: int = 0, bins: int = 5) -> torch.Tensor:
    """Log-mel-like values: different means and spreads, one bin nearly pinned at the floor."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, bins, generator=g) * torch.tensor([4.0, 2.0, 1.0, 0.5, 2e-3]) + torch.tensor(
        [-4.0, -7.0, 3.0, 0.0, -15.94]
    )
    return x


def close(a: Statistics, values: torch.Tensor) -> None:
    x = values.double().numpy()
    np.testing.assert_allclose(a.dataset_mean, x.mean(), rtol=1e-12)
    np.testing.assert_allclose(a.dataset_std, x.std(), rtol=1e-12)
    np.testing.assert_allclose(a.bin_mean, x.mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(a.bin_std, x.std(0), rtol=1e-7)
    assert a.frames == len(x)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6).filter(lambda n: sum(n) > 1))
def test_batches_add_up(sizes: list[int]) -> None:
    values = logs(sum(sizes))
    stats = RunningStats(5)
    for part in values.split(sizes):
        stats.update(packed(part))
    close(stats.result(), values)


def test_parts_of_several_ranks_merge() -> None:
    values = logs(1000)
    parts = [RunningStats(5) for _ in range(3)]
    for stats, part in zip(parts, values.split([100, 700, 200]), strict=True):
        stats.update(packed(part))
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    close(parts[0].result(), values)


def test_a_large_offset_keeps_the_variance() -> None:
    stats = RunningStats(5)
    values = logs(50_000)
    for part in values.split(1000):
        stats.update(packed(part))
    assert stats.result().bin_std[4] == pytest.approx(
        values[:, 4].double().std(correction=0).item(), rel=1e-6
    )


def test_flat_bins_are_named() -> None:
    stats = RunningStats(5)
    stats.update(packed(logs(1000)))
    result = stats.result()
    assert result.flat_bins == (4,)
    assert "1 of 5 mel bins have a standard deviation under 0.1 (bins 4)" in (result.warning() or "")
    assert "floor them at 0.1" in (result.warning() or "")


def test_silence_is_named_and_good_audio_is_not() -> None:
    silent, good = RunningStats(5), RunningStats(5)
    silent.update(packed(torch.full((100, 5), -15.94)))
    good.update(packed(torch.randn(100, 5, generator=torch.Generator().manual_seed(0))))
    assert "dataset_std is 0" in (silent.result().warning() or "")
    assert good.result().warning() is None


def test_nothing_seen() -> None:
    with pytest.raises(DataError, match="no frames were seen"):
        RunningStats(5).result()
