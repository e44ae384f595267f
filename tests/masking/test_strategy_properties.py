# SPDX-License-Identifier: Apache-2.0
"""What every strategy keeps to, on every grid: exact counts, a partition, no neighbours, no recompiling, uniform rates
where it has no preference."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import batch, key, local_visible, shown
from scipy import stats
from torch import Tensor

from masktrain.config import from_dict, to_dict
from masktrain.masking import (
    STRATEGIES,
    ChunkMasking,
    DispersionMasking,
    FrequencyMasking,
    HintConfig,
    InverseBlockMasking,
    PatchDropMasking,
    RandomMasking,
    Strategy,
    TimeMasking,
    check_plan,
    strategy,
    visible_count,
)
from masktrain.masking.view import View

ONE_VALUE = HintConfig(abs_hint_ratio=0.4)
TOKENS: list[Any] = [
    RandomMasking(),
    ChunkMasking(),
    InverseBlockMasking(),
    InverseBlockMasking(side=2, adjust=0.0, start_epoch=60, epochs=100),
    DispersionMasking(),
    DispersionMasking(hint=ONE_VALUE, deterministic=True),
    DispersionMasking(hint=ONE_VALUE, weight="variance"),
]
"""With a count of tokens."""
ALL: list[Any] = [
    *TOKENS,
    TimeMasking(),
    TimeMasking(contiguous=True),
    TimeMasking(reading="code"),
    FrequencyMasking(),
    FrequencyMasking(reading="code"),
    PatchDropMasking(shared_in_batch=False),
    PatchDropMasking(),
]
RAGGED = [m for m in ALL if m != PatchDropMasking()]


@pytest.mark.parametrize(
    ("columns", "freq", "ratio", "visible"),
    [
        (8, 8, 0.75, 16),
        (38, 5, 0.75, 47),
        (38, 5, 0.7, 57),
        (64, 8, 0.8, 102),
        (38, 5, 0.8, 37),
        (38, 5, 0.9, 18),
    ],
)
@pytest.mark.parametrize("masking", TOKENS, ids=str)
def test_published_counts(masking: Any, columns: int, freq: int, ratio: float, visible: int) -> None:
    """192 and 304, of AudioMosaic's masks, are in test_axes.py."""
    layout, view = batch([columns] * 2, freq, "freq")
    plan = replace(masking, mask_ratio=ratio).plan(layout, key(), 0, view)
    check_plan(plan)
    assert plan.n_visible == (visible, visible)


@given(
    st.sampled_from(RAGGED),
    st.floats(0.001, 0.999),
    st.lists(st.integers(0, 12), max_size=5),
    st.integers(1, 6),
    st.sampled_from(["time", "freq"]),
    st.integers(1, 3),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=300, deadline=None)
def test_every_plan_is_a_partition_with_exact_counts(
    masking: Any,
    ratio: float,
    columns: list[int],
    freq: int,
    order: str,
    patch: int,
    progress: float,
    step: int,
) -> None:
    """One row, one column, no column, counts that come to one token or to all: everything is drawn here."""
    field = "drop_ratio" if isinstance(masking, PatchDropMasking) else "mask_ratio"
    masking = replace(masking, **{field: ratio})
    layout, view = batch(columns, freq, order, patch=patch, progress=progress)
    plan = masking.plan(layout, key(step), 0, view)
    check_plan(plan)
    assert plan.layout is layout
    if not isinstance(masking, TimeMasking | FrequencyMasking):
        assert plan.n_visible == tuple(visible_count(n, ratio) for n in layout.lengths)
    again = masking.plan(layout, key(step), 0, view)
    assert torch.equal(plan.visible, again.visible) and torch.equal(plan.masked, again.masked)


@given(st.sampled_from(RAGGED), st.data(), st.sampled_from(["time", "freq"]))
@settings(max_examples=80, deadline=None)
def test_a_clip_does_not_depend_on_its_batch(masking: Any, data: st.DataObject, order: str) -> None:
    columns = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    ids = data.draw(
        st.lists(st.integers(0, 2**31), min_size=len(columns), max_size=len(columns), unique=True)
    )

    def drawn(which: list[int]) -> list[list[int]]:
        layout, view = batch([columns[i] for i in which], 4, order, [ids[i] for i in which], patch=2)
        return local_visible(masking.plan(layout, key(3), 0, view))

    whole = drawn(list(range(len(columns))))
    shuffled = list(data.draw(st.permutations(range(len(columns)))))
    assert drawn(shuffled) == [whole[i] for i in shuffled]
    for i in shuffled:
        assert drawn([i]) == [whole[i]]


@pytest.mark.parametrize("masking", ALL, ids=str)
def test_seed_step_and_draw_each_change_the_mask(masking: Any) -> None:
    layout, view = batch([40, 40], 8)
    base = masking.plan(layout, key(1, 1), 0, view).visible
    for k, draw in ((key(2, 1), 0), (key(1, 2), 0), (key(1, 1), 1), (key(1, 1), 15)):
        assert not torch.equal(masking.plan(layout, k, draw, view).visible, base)


@pytest.mark.parametrize(
    "masking",
    [
        InverseBlockMasking(),
        DispersionMasking(),
        DispersionMasking(hint=ONE_VALUE, deterministic=True, weight="variance"),
        TimeMasking(contiguous=True),
        TimeMasking(reading="code"),
        FrequencyMasking(),
        PatchDropMasking(),
    ],
    ids=str,
)
def test_a_traced_step_draws_anew_without_recompiling(masking: Any) -> None:
    compiles = []

    def backend(graph: Any, example_inputs: object) -> Any:
        compiles.append(graph)
        return graph.forward

    def step(frames: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
        seen = View(0.7, replace(view.spectrogram, frames=frames), view.mean, view.scale)
        plan = masking.plan(layout, replace(key(), counter=counter), 0, seen)
        return plan.visible, plan.masked

    columns = [40, 40] if masking == PatchDropMasking() else [40, 40, 20]
    layout, view = batch(columns, 4)
    # The sizes of another test are none of this one's.
    torch.compiler.reset()
    traced = torch.compile(step, backend=backend, fullgraph=True)
    masks = set()
    for s in range(3):
        counter = torch.tensor([5, s])
        got, want = traced(view.spectrogram.frames, counter), step(view.spectrogram.frames, counter)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        masks.add(tuple(got[0].tolist()))
    assert len(masks) == 3 and len(compiles) == 1


@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize(
    "masking",
    [
        RandomMasking(),
        PatchDropMasking(shared_in_batch=False),
        DispersionMasking(hint=HintConfig(abs_hint_ratio=1.0)),
        # Before the start epoch.
        InverseBlockMasking(start_epoch=80, epochs=100),
    ],
    ids=str,
)
def test_uniform_over_tokens(masking: Any, order: str) -> None:
    draws, columns, freq = 4000, 10, 4
    layout, view = batch([columns] * draws, freq, order, frames=torch.empty(0, freq))
    counts = shown(masking.plan(layout, key(), 0, view)).view(draws, -1).sum(0).double()
    n = columns * freq
    p = visible_count(n, masking.mask_ratio) / n
    chi2 = float(((counts - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (n - 1) / n)
    assert 1e-4 < stats.chi2.sf(chi2, n - 1) < 1 - 1e-4


@pytest.mark.parametrize("name", STRATEGIES)
def test_registry_and_json(name: str) -> None:
    cls = strategy(name)
    assert cls.name == name
    config = cls()
    assert from_dict(Strategy, to_dict(config)) == config
    assert 0 < config.mask_ratio < 1 and config.needs in ("nothing", "progress", "spectrogram", "features")


def test_the_names_of_the_command_line() -> None:
    asked = "random frame chunk time frequency time_frequency inverse_block dispersion self_guided patch_drop"
    assert set(STRATEGIES) == set(asked.split())


def test_hint_options_survive_json() -> None:
    config = DispersionMasking(weight="variance", hint=HintConfig(gamma=4, start_epoch=3, epochs=20))
    assert from_dict(Strategy, to_dict(config)) == config


def test_inverse_blocks_share_fewer_borders_than_random_masks() -> None:
    """Visible tokens of blocks lie together: neighbours in the mask, against those by chance."""
    draws, columns, freq = 500, 64, 8
    layout, view = batch([columns] * draws, freq, frames=torch.empty(0, freq))
    beside = []
    for masking in (InverseBlockMasking(), RandomMasking(mask_ratio=0.8)):
        v = shown(masking.plan(layout, key(), 0, view)).view(draws, columns, freq)
        beside.append(float((v[:, 1:] & v[:, :-1]).sum() / v.sum()))
    assert beside[0] > 2.5 * beside[1] and math.isclose(beside[1], 0.2, abs_tol=0.02)
