# SPDX-License-Identifier: Apache-2.0
"""Masks of whole columns and rows: exact counts on every grid, and the statistics of AudioMAE's own masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.config import from_dict, to_dict
from masktrain.errors import ConfigError
from masktrain.masking import Strategy, TimeFrequencyMasking, check_plan, strategy, visible_count
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, TokenLayout, cumulative

DRAWS = 4000


def layout(columns: list[int], freq: int, order: str = "time", ids: list[int] | None = None) -> TokenLayout:
    grid = TokenGrid(freq=freq, patch_freq=1, patch_time=1, order=order)  # type: ignore[arg-type]
    lengths = tuple(columns)
    clip_ids = torch.tensor(list(range(len(columns))) if ids is None else ids, dtype=torch.int64)
    cu = cumulative(lengths, torch.int64, "cpu")
    return grid.layout(Spectrogram(torch.zeros(sum(columns), freq), lengths, cu, clip_ids))


def key(step: int = 0, seed: int = 42) -> StepKey:
    return StepKey.make(seed, step, "cpu")


def shown(plan: MaskPlan) -> list[Tensor]:
    """(columns, rows) bool of each clip, True where visible."""
    flat = torch.zeros(sum(plan.layout.lengths), dtype=torch.bool)
    flat[plan.visible.long()] = True
    grid, found = plan.layout.grid, []
    for part, columns in zip(flat.split(list(plan.layout.lengths)), plan.layout.columns, strict=True):
        by_time = grid.order == "time"
        found.append(part.view(columns, grid.freq) if by_time else part.view(grid.freq, columns).T)
    return found


RATIO = st.floats(0, 0.99)


@given(
    RATIO,
    RATIO.filter(lambda p: p > 0),
    st.lists(st.integers(0, 12), max_size=5),
    st.integers(1, 6),
    st.sampled_from(["time", "freq"]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_visible_is_columns_times_rows(p_t, p_f, columns, freq, order, step):
    masking = TimeFrequencyMasking(mask_t_prob=p_t, mask_f_prob=p_f)
    plan = masking.plan(layout(columns, freq, order), key(step))
    check_plan(plan)
    rows = visible_count(freq, p_f)
    assert plan.n_visible == tuple(rows * visible_count(c, p_t) for c in columns)
    for mask, c in zip(shown(plan), columns, strict=True):
        if c:
            assert torch.equal(mask, mask.any(1)[:, None] & mask.any(0))
            assert int(mask.any(1).sum()) == visible_count(c, p_t) and int(mask.any(0).sum()) == rows


@pytest.mark.parametrize("order", ["time", "freq"])
def test_a_clip_does_not_depend_on_its_batch_or_order(order: str) -> None:
    masking, columns, ids = TimeFrequencyMasking(), [12, 5, 9, 1], [7, 100, 3, 8]
    whole = shown(masking.plan(layout(columns, 4, order, ids), key(3)))
    for i, c in enumerate(columns):
        for other in ("time", "freq"):
            assert torch.equal(shown(masking.plan(layout([c], 4, other, [ids[i]]), key(3)))[0], whole[i])


def test_seed_step_clip_and_draw_each_change_the_mask() -> None:
    masking, tokens = TimeFrequencyMasking(), layout([40, 40], 8)
    base = masking.plan(tokens, key(1, 1))
    first, second = shown(base)
    assert not torch.equal(first, second)
    for other in (
        masking.plan(tokens, key(2, 1)),
        masking.plan(tokens, key(1, 2)),
        masking.plan(tokens, key(1, 1), 1),
    ):
        assert not torch.equal(other.visible, base.visible)
    assert torch.equal(masking.plan(tokens, key(1, 1)).visible, base.visible)


def test_rows_and_columns_are_drawn_independently() -> None:
    """Of as many columns as rows: which column is kept says nothing of which row, also not from draw to draw."""
    n, masking = 4, TimeFrequencyMasking(mask_t_prob=0.75, mask_f_prob=0.75)
    tokens = layout([n] * DRAWS, n)
    place = [torch.stack(shown(masking.plan(tokens, key(), draw))) for draw in (0, 1)]
    column, row = (
        [mask.any(2).int().argmax(1) for mask in place],
        [mask.any(1).int().argmax(1) for mask in place],
    )
    pairs = [
        (column[0], row[0]),
        (column[1], row[1]),
        (column[0], column[1]),
        (row[0], row[1]),
        (row[0], column[1]),
    ]
    for a, b in pairs:
        counts = torch.bincount(n * a + b, minlength=n * n).double()
        expected = DRAWS / n**2
        # chi-squared of 15 degrees: above 50 once in 80000
        assert float(((counts - expected) ** 2 / expected).sum()) < 50


@pytest.fixture(scope="module")
def recorded(golden_dir: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    path = golden_dir / "masking" / "A_axis"
    if not path.with_suffix(".json").is_file():
        pytest.skip(f"no golden case {path}")
    return json.loads(path.with_suffix(".json").read_text()), dict(np.load(f"{path}.npz"))


SETTINGS = ("audiomae_t30_f30", "audiomae_t60_f50")


def from_noise(noise_t: Tensor, noise_f: Tensor, masking: TimeFrequencyMasking) -> Tensor:
    """(B, T * F) bool, True where masked: the rule on stored noise, with our counts."""
    kept = []
    for noise, p in ((noise_t, masking.mask_t_prob), (noise_f, masking.mask_f_prob)):
        mask = torch.zeros_like(noise, dtype=torch.bool)
        kept.append(mask.scatter_(1, noise.argsort(1)[:, : visible_count(noise.shape[1], p)], True))
    return ~(kept[0][:, :, None] & kept[1][:, None]).flatten(1)


@pytest.mark.parametrize("name", SETTINGS)
def test_stored_noise(recorded: tuple[dict[str, Any], dict[str, np.ndarray]], name: str) -> None:
    """The peer's noise gives the peer's mask by our counts; every such mask is one that we can draw."""
    record, arrays = recorded
    made = record["settings"][name]
    masking = TimeFrequencyMasking(mask_t_prob=made["mask_t_prob"], mask_f_prob=made["mask_f_prob"])
    noise_t, noise_f, mask = (
        torch.from_numpy(arrays[f"{name}/{what}"]) for what in ("noise_t", "noise_f", "mask")
    )
    assert torch.equal(from_noise(noise_t, noise_f, masking), mask)
    columns, rows = made["grid"]
    plan = masking.plan(layout([columns] * len(mask), rows), key())
    assert set(plan.n_visible) == set((~mask).sum(1).tolist())


def test_stored_noise_of_the_model(golden_dir: Path) -> None:
    path = golden_dir / "audiomae" / "A_mask2d"
    if not path.with_suffix(".json").is_file():
        pytest.skip(f"no golden case {path}")
    made = json.loads(path.with_suffix(".json").read_text())["constructor"]
    arrays = np.load(f"{path}.npz")
    masking = TimeFrequencyMasking(mask_t_prob=made["mask_t_prob"], mask_f_prob=made["mask_f_prob"])
    mask = from_noise(torch.from_numpy(arrays["noise_t"]), torch.from_numpy(arrays["noise_f"]), masking)
    assert torch.equal(mask.float(), torch.from_numpy(arrays["mask"]))


@pytest.mark.parametrize("name", SETTINGS)
def test_statistics(recorded: tuple[dict[str, Any], dict[str, np.ndarray]], name: str) -> None:
    """Rates per token, neighbours, variances and pairs are those of the peer within sampling error."""
    record, arrays = recorded
    made = record["settings"][name]
    columns, rows = made["grid"]
    masking = TimeFrequencyMasking(mask_t_prob=made["mask_t_prob"], mask_f_prob=made["mask_f_prob"])
    plan = masking.plan(layout([columns] * DRAWS, rows), key())
    mask = torch.stack(shown(plan)).double()
    assert arrays[f"{name}/visible_count_hist"][0].tolist() == sorted(set(plan.n_visible))

    rate, n = arrays[f"{name}/visible_rate"], int(arrays[f"{name}/n"])
    p = (rate * n + mask.flatten(1).mean(0).numpy() * DRAWS) / (n + DRAWS)
    z = (mask.flatten(1).mean(0).numpy() - rate) / np.sqrt(p * (1 - p) * (1 / n + 1 / DRAWS))
    assert np.abs(z).max() < 5 and (np.abs(z) > 3).mean() < 0.03

    total = mask.sum((1, 2))
    down = (mask[:, 1:] * mask[:, :-1]).sum((1, 2)) * 2 / total
    right = (mask[:, :, 1:] * mask[:, :, :-1]).sum((1, 2)) * 2 / total
    found = {
        "nb_row": down,
        "nb_col": right,
        "nb4": down + right,
        "var_per_row": mask.sum(2).var(1, correction=0),
        "var_per_col": mask.sum(1).var(1, correction=0),
    }
    for i, (a, b) in enumerate(((0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 4), (4, 0))):
        found[f"pair_visible {i}"] = (mask[:, a:, b:] * mask[:, : columns - a, : rows - b]).mean((1, 2))
    for what, values in found.items():
        field, _, line = what.partition(" ")
        stored = arrays[f"{name}/{field}"][int(line)] if line else arrays[f"{name}/{field}"]
        mean, error, _ = (float(v) for v in stored)
        ours, our_error = float(values.mean()), float(values.std()) / DRAWS**0.5
        # float32 in the file
        assert abs(ours - mean) < 4 * (error**2 + our_error**2) ** 0.5 + 1e-5 * abs(mean), what


def test_traced_once() -> None:
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    def step(tokens, counter):
        plan = TimeFrequencyMasking().plan(tokens, StepKey(counter, 0, 0))
        return plan.visible, plan.masked

    traced, tokens = torch.compile(step, backend=backend, fullgraph=True), layout([40, 40, 20], 4)
    for s in range(3):
        counter = torch.tensor([5, s])
        assert all(
            torch.equal(a, b) for a, b in zip(traced(tokens, counter), step(tokens, counter), strict=True)
        )
    assert len(compiles) == 1


def test_config() -> None:
    cls = strategy("time_frequency")
    assert cls is TimeFrequencyMasking and cls.needs == "nothing"
    config = TimeFrequencyMasking(mask_t_prob=0.3, mask_f_prob=0.2)
    assert from_dict(Strategy, to_dict(config)) == config
    assert config.mask_ratio == pytest.approx(0.44) and TimeFrequencyMasking().mask_ratio == pytest.approx(
        0.8
    )
    assert TimeFrequencyMasking(mask_t_prob=0, mask_f_prob=0.5).mask_ratio == 0.5


@pytest.mark.parametrize("field", ["mask_t_prob", "mask_f_prob"])
@pytest.mark.parametrize("value", [1, -0.1, 1.5, float("nan"), True, "0.5", None])
def test_shares_must_lie_between_0_and_1(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^masking\.{field}: a share .*received {value!r}"):
        TimeFrequencyMasking(**{field: value})


def test_something_must_be_masked() -> None:
    with pytest.raises(ConfigError, match="both 0, so that nothing would be masked"):
        TimeFrequencyMasking(mask_t_prob=0, mask_f_prob=0.0)
