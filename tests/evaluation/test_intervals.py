# SPDX-License-Identifier: Apache-2.0
"""Intervals: their coverage by simulation, and what a pair is."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from masktrain.evaluation.intervals import paired, t_interval


def test_interval_is_scipys_and_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    draws = rng.normal(0.7, 0.1, (4000, 5))
    expected = ttest_1samp(draws[0], 0.0).confidence_interval(0.95)
    found = t_interval(draws[0])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.mean, found.std) == pytest.approx((draws[0].mean(), draws[0].std(ddof=1)))
    covered = [interval.low < 0.7 < interval.high for interval in map(t_interval, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / 4000))


def test_one_value_has_no_interval() -> None:
    one = t_interval([0.5])
    assert (one.mean, one.std, one.low, one.high, one.excludes_zero) == (0.5, None, None, None, False)
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


def test_pairs_cancel_what_is_common_and_splits_guard_against_their_dependence() -> None:
    rng = np.random.default_rng(1)
    common = rng.normal(0.5, 0.2, (10, 5))
    ours = common + 0.05 + rng.normal(0, 0.01, (10, 5))
    gap = paired(ours, common)
    assert gap.pairs.n == 50 and gap.splits is not None and gap.splits.n == 5
    assert gap.excludes_zero and gap.pairs.mean == pytest.approx(0.05, abs=0.006)
    # an effect that only one fold has: fifty pairs call it sure, five folds do not
    single = common.copy()
    single[:, 0] += 0.1
    gap = paired(single, common)
    assert gap.pairs.excludes_zero and not gap.excludes_zero
    assert paired(ours[:, :1], common[:, :1]).splits is None
    with pytest.raises(ValueError, match="shapes"):
        paired(ours, common[:5])
