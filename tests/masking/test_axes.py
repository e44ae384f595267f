# SPDX-License-Identifier: Apache-2.0
"""Masks along one axis: AudioMosaic's two, as its paper and as its code have them, on grids of any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import batch, key, shown
from scipy import stats
from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.masking import (
    FrameMasking,
    FrequencyMasking,
    TimeFrequencyMasking,
    TimeMasking,
    check_plan,
    visible_count,
)
from masktrain.types import MaskPlan


def grids(plan: MaskPlan) -> list[Tensor]:
    """(columns, rows) bool of each clip, True where visible."""
    grid, found = plan.layout.grid, []
    parts = shown(plan).split(list(plan.layout.lengths))
    for part, columns in zip(parts, plan.layout.columns, strict=True):
        by_time = grid.order == "time"
        found.append(part.view(columns, grid.freq) if by_time else part.view(grid.freq, columns).T)
    return found


@pytest.mark.parametrize(
    ("masking", "visible"),
    [
        (TimeMasking(mask_ratio=0.6, reading="code"), 192),
        (FrequencyMasking(mask_ratio=0.4, reading="code"), 304),
        (TimeMasking(mask_ratio=0.6), 200),
        (TimeMasking(mask_ratio=0.6, contiguous=True), 200),
        (FrequencyMasking(mask_ratio=0.4), 256),
        # "both": each view gets both masks.
        (TimeFrequencyMasking(mask_t_prob=0.6, mask_f_prob=0.4), 100),
    ],
)
def test_counts_of_audiomosaic(masking: TimeMasking, visible: int) -> None:
    plan = masking.plan(batch([64, 64], 8)[0], key())
    check_plan(plan)
    assert plan.n_visible == (visible, visible)


MASKINGS = st.one_of(
    st.builds(TimeMasking, mask_ratio=st.floats(0.01, 0.99), reading=st.sampled_from(["paper", "code"])),
    st.builds(TimeMasking, mask_ratio=st.floats(0.01, 0.99), contiguous=st.just(True)),
    st.builds(FrequencyMasking, mask_ratio=st.floats(0.01, 0.99), reading=st.sampled_from(["paper", "code"])),
)


@given(
    MASKINGS,
    st.lists(st.integers(0, 12), max_size=5),
    st.integers(1, 6),
    st.sampled_from(["time", "freq"]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_units_are_masked_whole(
    masking: TimeMasking | FrequencyMasking, columns: list[int], freq: int, order: str, step: int
) -> None:
    plan = masking.plan(batch(columns, freq, order)[0], key(step))
    check_plan(plan)
    for mask, c in zip(grids(plan), columns, strict=True):
        if not c:
            continue
        if masking.reading == "code":
            # The tokens in time-major order, cut into R rows of C.
            units = mask.reshape(freq, c)
            units = units if isinstance(masking, TimeMasking) else units.T
        else:
            units = mask if isinstance(masking, TimeMasking) else mask.T
        assert torch.equal(units.any(1), units.all(1))
        assert int(units.all(1).sum()) == visible_count(len(units), masking.mask_ratio)
        if getattr(masking, "contiguous", False):
            edges = torch.cat([torch.ones(1, dtype=torch.bool), units.any(1)])
            assert int((edges[:-1] & ~edges[1:]).sum()) <= 1


@pytest.mark.parametrize(
    "masking",
    [
        TimeMasking(reading="code"),
        FrequencyMasking(reading="code"),
        FrequencyMasking(),
        TimeMasking(contiguous=True),
    ],
    ids=str,
)
def test_a_clip_does_not_depend_on_its_batch_or_order(masking: TimeMasking) -> None:
    columns, ids = [12, 5, 9, 1], [7, 100, 3, 8]
    whole = grids(masking.plan(batch(columns, 4, "time", ids)[0], key(3)))
    for i, c in enumerate(columns):
        for order in ("time", "freq"):
            alone = grids(masking.plan(batch([c], 4, order, [ids[i]])[0], key(3)))[0]
            assert torch.equal(alone, whole[i])


def test_true_columns_are_those_of_frame_masking() -> None:
    layout, _ = batch([20, 3], 4, "freq")
    ours, theirs = TimeMasking(mask_ratio=0.75), FrameMasking(mask_ratio=0.75)
    assert torch.equal(ours.plan(layout, key(1), 3).visible, theirs.plan(layout, key(1), 3).visible)


def test_the_code_masks_stretches_of_whole_columns_on_its_grid() -> None:
    """64 x 8: three stretches of eight columns stay; the "frequencies" repeat every eight columns and hit all rows."""
    mask = grids(TimeMasking(reading="code").plan(batch([64], 8)[0], key()))[0]
    assert torch.equal(mask.view(8, 8, 8).any(2).any(1), mask.view(8, 8, 8).all(2).all(1))
    mask = grids(FrequencyMasking(reading="code").plan(batch([64], 8)[0], key()))[0]
    assert (mask.view(8, 8, 8) == mask[:8]).all() and mask.any(0).all()


@pytest.mark.parametrize(
    ("masking", "units"),
    [
        (TimeMasking(mask_ratio=0.6, reading="code"), 8),
        (FrequencyMasking(mask_ratio=0.4, reading="code"), 16),
        (FrequencyMasking(mask_ratio=0.4), 8),
    ],
    ids=str,
)
def test_every_unit_has_the_same_chance(masking: TimeMasking, units: int) -> None:
    draws = 4000
    v = torch.stack(grids(masking.plan(batch([16] * draws, 8, frames=torch.empty(0, 8))[0], key())))
    if masking.reading == "code":
        v = v.reshape(draws, 8, 16)
        kept = v.all(2) if isinstance(masking, TimeMasking) else v.all(1)
    else:
        kept = v.all(1)
    assert kept.shape[1] == units
    counts, p = kept.sum(0).double(), visible_count(units, masking.mask_ratio) / units
    chi2 = float(((counts - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (units - 1) / units)
    assert 1e-4 < stats.chi2.sf(chi2, units - 1) < 1 - 1e-4


def test_every_place_of_the_stretch_has_the_same_chance() -> None:
    draws, columns = 4000, 12
    plan = TimeMasking(mask_ratio=0.6, contiguous=True).plan(
        batch([columns] * draws, 2, frames=torch.empty(0, 2))[0], key()
    )
    v = shown(plan).view(draws, columns, 2).all(2)
    starts = torch.bincount((~v).int().argmax(1), minlength=columns).double()
    # 4 columns stay: 5 places.
    assert (v.sum(1) == 4).all() and not starts[5:].any()
    assert stats.chisquare(starts[:5]).pvalue > 1e-4


def test_options() -> None:
    with pytest.raises(ConfigError, match=r"masking\.reading: 'both' is not known; allowed: paper, code"):
        TimeMasking(reading="both")
    with pytest.raises(ConfigError, match=r"masking\.reading"):
        FrequencyMasking(reading="")
    with pytest.raises(ConfigError, match=r"masking\.contiguous: the code .* Leave it out"):
        TimeMasking(reading="code", contiguous=True)
    for cls in (TimeMasking, FrequencyMasking):
        with pytest.raises(ConfigError, match=r"^masking\.mask_ratio"):
            cls(mask_ratio=1)
