# SPDX-License-Identifier: Apache-2.0
"""The hint ratio over a run, and the exchange: how much of a mask it keeps, and that the rest is uniform."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import batch, key, local_visible, shown
from scipy import stats

from masktrain.errors import ConfigError
from masktrain.masking import HintConfig, RandomMasking, check_plan, plan_from_ids
from masktrain.masking.hint import exchange

DRAWS = 8000


@given(st.integers(1, 2000), st.integers(1, 500), st.data())
@settings(max_examples=200, deadline=None)
def test_an_epoch_begins_where_it_should(epochs: int, steps_per_epoch: int, data: st.DataObject) -> None:
    """At the first and the last step of an epoch, as the trainer counts progress."""
    start = data.draw(st.integers(0, epochs))
    hint = HintConfig(gamma=1.5, start_epoch=start, epochs=epochs)
    epoch, horizon = data.draw(st.integers(0, epochs - 1)), epochs * steps_per_epoch
    expected = 1.0 if epoch < start else 1 - (epoch / epochs) ** 1.5
    for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
        assert hint.ratio(step / horizon) == expected


def test_the_ends_of_a_run() -> None:
    assert HintConfig().ratio(0) == 1
    assert HintConfig(start_epoch=0).ratio(1) == 1 - (299 / 300) ** 2
    assert HintConfig(start_epoch=300).ratio(1) == 1
    for fixed in (0, 0.5, 1):
        assert {HintConfig(abs_hint_ratio=fixed).ratio(p) for p in (0, 0.3, 1)} == {float(fixed)}


def first(columns: list[int], kept: int) -> tuple[object, list[int]]:
    """A plan that shows the first `kept` tokens of each clip."""
    layout, _ = batch(columns, freq=1)
    return plan_from_ids(layout, [list(range(min(kept, c))) for c in columns]), columns


@given(
    st.lists(st.integers(0, 14), max_size=5), st.integers(1, 10), st.floats(0, 1), st.integers(0, 2**32 - 1)
)
@settings(max_examples=100, deadline=None)
def test_counts_stay_and_what_must_stay_masked_does(
    columns: list[int], kept: int, ratio: float, step: int
) -> None:
    plan, _ = first(columns, kept)
    after = exchange(plan.layout, key(step), 0, plan, ratio)
    check_plan(after)
    assert (after.n_visible, after.n_masked) == (plan.n_visible, plan.n_masked)
    still = (~shown(after) & ~shown(plan)).split(list(plan.layout.lengths))
    for mask, m in zip(still, plan.n_masked, strict=True):
        assert int(mask.sum()) >= m - int(m * ratio)
    if not any(int(m * ratio) for m in plan.n_masked):
        assert after is plan


@pytest.mark.parametrize(("n", "kept", "ratio"), [(20, 6, 0.5), (12, 3, 0.25), (10, 2, 0.9)])
def test_the_overlap_is_hypergeometric(n: int, kept: int, ratio: float) -> None:
    """M - h stay masked, and of h masked anew, drawn from L - (M - h), some were masked before."""
    masked, h = n - kept, int((n - kept) * ratio)
    plan, _ = first([n] * DRAWS, kept)
    after = exchange(plan.layout, key(), 0, plan, ratio)
    v = shown(after).view(DRAWS, n)
    again = (~v)[:, kept:].sum(1) - (masked - h)
    law = stats.hypergeom(n - masked + h, h, h)
    times = torch.bincount(again, minlength=h + 1).numpy()
    expected = law.pmf(range(h + 1)) * DRAWS
    usual = expected > 5
    chi2 = ((times - expected) ** 2 / expected.clip(1e-9))[usual].sum()
    assert stats.chi2.sf(chi2, usual.sum() - 1) > 1e-4
    # Within what was masked, and within what was visible, every token has the same chance.
    for part in (v[:, :kept], v[:, kept:]):
        counts = part.sum(0).double()
        mean = counts.mean()
        cells = len(counts)
        p = float(mean) / DRAWS
        # As if draws were independent between cells, which overstates the spread: a bound, not the law.
        assert float(((counts - mean) ** 2).sum() / (DRAWS * p * (1 - p))) < stats.chi2.isf(1e-4, cells)


def test_ratio_1_is_uniform_over_all_tokens() -> None:
    n, kept = 16, 4
    plan, _ = first([n] * DRAWS, kept)
    counts = shown(exchange(plan.layout, key(), 0, plan, 1.0)).view(DRAWS, n).sum(0).double()
    p = kept / n
    chi2 = float(((counts - DRAWS * p) ** 2).sum() / (DRAWS * p * (1 - p)) * (n - 1) / n)
    assert 1e-4 < stats.chi2.sf(chi2, n - 1) < 1 - 1e-4


def test_a_clip_does_not_depend_on_its_batch_and_draws_differ() -> None:
    columns, ids = [30, 12, 21], [5, 800, 9]
    layout, _ = batch(columns, 1, clip_ids=ids)
    whole = local_visible(exchange(layout, key(3), 0, plan_from_ids(layout, [[0], [0], [0]]), 0.5))
    for i, c in enumerate(columns):
        alone, _ = batch([c], 1, clip_ids=[ids[i]])
        assert local_visible(exchange(alone, key(3), 0, plan_from_ids(alone, [[0]]), 0.5)) == [whole[i]]
    plan = RandomMasking().plan(layout, key())
    seen = {tuple(exchange(layout, key(), draw, plan, 0.8).visible.tolist()) for draw in range(16)}
    assert len(seen) == 16


def test_the_exchange_is_independent_of_the_mask_it_exchanges() -> None:
    """The words of the random mask are not those of the exchange: what was masked is revealed at one rate."""
    n = 40
    layout, _ = batch([n] * DRAWS, 1)
    plan = RandomMasking().plan(layout, key())
    after = exchange(layout, key(), 0, plan, 0.5)
    h, masked = 15, 30
    stay = (~shown(after) & ~shown(plan)).view(DRAWS, n).sum(1).double()
    expected = masked - h + h * h / (n - masked + h)
    assert abs(float(stay.mean()) - expected) < 4.5 * float(stay.std()) / DRAWS**0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gamma": 0}, r"masking\.hint\.gamma: the exponent must be above 0, received 0"),
        ({"gamma": float("nan")}, r"masking\.hint\.gamma"),
        ({"gamma": True}, r"masking\.hint\.gamma"),
        ({"epochs": 0}, r"masking\.hint\.epochs: a whole number of at least 1, received 0"),
        ({"epochs": 10.0}, r"masking\.hint\.epochs"),
        ({"start_epoch": 301}, r"masking\.hint\.start_epoch: a whole number from 0 to .* 300; received 301"),
        ({"start_epoch": -1}, r"masking\.hint\.start_epoch"),
        ({"abs_hint_ratio": 1.5}, r"masking\.hint\.abs_hint_ratio: a share .* received 1\.5"),
        ({"abs_hint_ratio": float("nan")}, r"masking\.hint\.abs_hint_ratio"),
    ],
)
def test_options(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        HintConfig(**change)
