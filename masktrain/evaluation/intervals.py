# SPDX-License-Identifier: Apache-2.0
"""Mean, spread and 95 % interval of repeated scores, and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """mean of n values; std: between them (n - 1); low, high: the 95 % interval of the mean. One value has no
    spread and no interval: None."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_interval(values: Sequence[float] | NDArray[np.float64]) -> Interval:
    """Return the interval of Student's t for the mean of independent values. Raises ValueError for none."""
    array = np.asarray(values, dtype=np.float64)
    n = array.size
    if n == 0:
        raise ValueError("t_interval: no values")
    mean = float(array.mean())
    if n == 1:
        return Interval(1, mean, None, None, None)
    from scipy.stats import t

    std = float(array.std(ddof=1))
    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * std / math.sqrt(n)
    return Interval(n, mean, std, mean - half, mean + half)


@dataclass(frozen=True)
class Difference:
    """What one way scores above another on the same splits and seeds.

    pairs: over all pairs of split and seed. splits: over the splits, each the mean over its seeds: wider, since
    seeds that share their clips are not independent of one another; None for a single split.
    """

    pairs: Interval
    splits: Interval | None

    @property
    def excludes_zero(self) -> bool:
        """Whether every interval that there is excludes 0."""
        return self.pairs.excludes_zero and (self.splits is None or self.splits.excludes_zero)


def paired(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> Difference:
    """Return ours - theirs, (seeds, splits) scores of the same seeds and splits. Raises ValueError otherwise."""
    if ours.shape != theirs.shape or ours.ndim != 2:
        raise ValueError(f"paired: shapes {ours.shape} and {theirs.shape} are no (seeds, splits) of one kind")
    gap = ours - theirs
    return Difference(t_interval(gap.ravel()), t_interval(gap.mean(0)) if gap.shape[1] > 1 else None)
