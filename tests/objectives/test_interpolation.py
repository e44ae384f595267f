# SPDX-License-Identifier: Apache-2.0
"""Linear interpolation in time, the predictor that reconstructions are compared with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from masktrain.masking.plan import plan_from_ids
from masktrain.objectives.patches import interpolated, masked_patches, seen_cells, visible_levels
from masktrain.types import MaskPlan, Order, Spectrogram, TokenGrid, cumulative

MEAN, SCALE = torch.tensor([0.5]).double(), torch.tensor([2.0]).double()


def case(order: Order, seed: int) -> tuple[Spectrogram, MaskPlan]:
    """Clips of 3, 1 and 5 columns of 2 frames, the last two with a frame more, which no token covers."""
    random = np.random.default_rng(seed)
    grid = TokenGrid(freq=3, patch_freq=2, patch_time=2, order=order, partial="drop")
    lengths = (6, 3, 11)
    spectrogram = Spectrogram(
        torch.from_numpy(random.normal(size=(sum(lengths), 6))),
        lengths,
        cumulative(lengths, torch.int64, "cpu"),
        torch.arange(3),
    )
    layout = grid.layout(spectrogram)
    visible = [random.permutation(n)[: max(1, n // 3)].tolist() for n in layout.lengths]
    return spectrogram, plan_from_ids(layout, visible)


def cells(spectrogram: Spectrogram, plan: MaskPlan) -> list[np.ndarray]:
    """Which cells of each clip are visible, by a loop over tokens."""
    grid, out, start = plan.layout.grid, [], 0
    masked = set(plan.masked.tolist())
    for columns, tokens, length in zip(
        plan.layout.columns, plan.layout.lengths, spectrogram.lengths, strict=True
    ):
        seen = np.zeros((length, 6), dtype=bool)
        for t in range(tokens):
            if start + t not in masked:
                column, row = divmod(t, grid.freq) if grid.order == "time" else (t % columns, t // columns)
                seen[2 * column : 2 * column + 2, 2 * row : 2 * row + 2] = True
        out.append(seen)
        start += tokens
    return out


@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("seed", range(4))
def test_each_bin_is_interpolated_between_what_is_visible(order: Order, seed: int) -> None:
    spectrogram, plan = case(order, seed)
    seen = cells(spectrogram, plan)
    assert np.array_equal(seen_cells(spectrogram, plan).numpy(), np.concatenate(seen))
    everything = np.concatenate(seen)
    frames = spectrogram.frames.numpy()
    filled = []
    for clip, shown in enumerate(seen):
        truth = spectrogram.clip(clip).numpy()
        out = np.empty_like(truth)
        for b in range(6):
            known = np.flatnonzero(shown[:, b])
            if len(known):
                out[:, b] = np.interp(np.arange(len(truth)), known, truth[known, b])
            elif everything[:, b].any():
                out[:, b] = frames[everything[:, b], b].mean()
            else:
                out[:, b] = frames[everything].mean()
        filled.append(out)
    want = masked_patches(torch.from_numpy(np.concatenate(filled)), plan, MEAN, SCALE)
    torch.testing.assert_close(interpolated(spectrogram, plan, MEAN, SCALE), want, rtol=0, atol=1e-12)


def test_a_straight_line_is_met_exactly() -> None:
    line = torch.arange(6.0).double()[:, None] * torch.arange(1.0, 7.0).double()
    one = Spectrogram(line, (6,), cumulative((6,), torch.int64, "cpu"), torch.arange(1))
    grid = TokenGrid(freq=3, patch_freq=2, patch_time=2, order="time", partial="drop")
    plan = plan_from_ids(grid.layout(one), [[0, 1, 2, 6, 7, 8]])
    want = masked_patches(line, plan, MEAN, SCALE)
    torch.testing.assert_close(interpolated(one, plan, MEAN, SCALE), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("seed", range(3))
def test_levels_are_interpolated_between_visible_patches(order: Order, seed: int) -> None:
    """Against a loop over tokens and numpy's interpolation over columns."""
    spectrogram, plan = case(order, seed)
    average, variance = visible_levels(spectrogram, plan, MEAN, SCALE)
    torch.testing.assert_close(
        average[:, 0], interpolated(spectrogram, plan, MEAN, SCALE).mean(1), rtol=0, atol=1e-12
    )
    grid, visible = plan.layout.grid, set(plan.visible.tolist())
    known: list[tuple[int, int, int, float]] = []  # clip, row, column, variance
    wanted: list[tuple[int, int, int]] = []
    start = 0
    for clip, (columns, tokens) in enumerate(zip(plan.layout.columns, plan.layout.lengths, strict=True)):
        for t in range(tokens):
            column, row = divmod(t, grid.freq) if order == "time" else (t % columns, t // columns)
            cells = spectrogram.clip(clip)[2 * column : 2 * column + 2, 2 * row : 2 * row + 2]
            if start + t in visible:
                known.append((clip, row, column, float(np.var((cells.numpy() - 0.5) * 2, ddof=1))))
            else:
                wanted.append((clip, row, column))
        start += tokens
    for (clip, row, column), found in zip(wanted, variance[:, 0].tolist(), strict=True):
        beside = [(c, v) for i, r, c, v in known if (i, r) == (clip, row)]
        want = np.mean([v for *_, v in known])
        if beside:
            want = np.interp(column, [c for c, _ in beside], [v for _, v in beside])
        assert found == pytest.approx(want, abs=1e-12)
