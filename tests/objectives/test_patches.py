# SPDX-License-Identifier: Apache-2.0
"""Masked patches as targets, and the per-bin-mean predictor, against plain loops over tokens, bins and frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from masktrain.masking.plan import plan_from_ids
from masktrain.objectives.patches import masked_patches, mel_rows, per_bin_mean, squared_error, standardised
from masktrain.types import MaskPlan, Spectrogram, TokenGrid, cumulative

GRIDS = {
    order: TokenGrid(freq=3, patch_freq=2, patch_time=4, order=order, partial="drop")
    for order in ("time", "freq")
}
LENGTHS = (12, 4, 21)
VISIBLE = ([0, 4], [1], [2, 3, 14])
MEAN, SCALE = torch.full((1,), -4.0, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)


@pytest.fixture(params=GRIDS.values(), ids=GRIDS.keys())
def case(request: pytest.FixtureRequest) -> tuple[Spectrogram, MaskPlan]:
    """Three clips of unequal length; each bin has its own level and range."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(sum(LENGTHS), 6, generator=generator, dtype=torch.float64)
    frames = noise * torch.linspace(0.5, 3, 6) + torch.linspace(-9, 1, 6)
    spectrogram = Spectrogram(frames, LENGTHS, cumulative(LENGTHS, torch.int64, "cpu"), torch.arange(3))
    return spectrogram, plan_from_ids(request.param.layout(spectrogram), VISIBLE)


def cells_of(plan: MaskPlan) -> list[tuple[int, int, int]]:
    """(clip, row, column) of each masked token, in the order of the plan."""
    grid, out = plan.layout.grid, []
    for clip, (frames, visible) in enumerate(zip(LENGTHS, VISIBLE, strict=True)):
        columns = frames // 4
        tokens = [(r, c) for c in range(columns) for r in range(3)]
        if grid.order == "freq":
            tokens = [(r, c) for r in range(3) for c in range(columns)]
        out += [(clip, r, c) for t, (r, c) in enumerate(tokens) if t not in visible]
    return out


def values_of(grid: TokenGrid) -> list[tuple[int, int]]:
    """(frame, bin) within a patch of each of its values, in their order."""
    if grid.order == "time":
        return [(t, f) for t in range(4) for f in range(2)]
    return [(t, f) for f in range(2) for t in range(4)]


def plain_patches(spectrogram: Spectrogram, plan: MaskPlan) -> Tensor:
    return torch.stack(
        [
            torch.stack(
                [
                    (spectrogram.clip(b)[4 * column + t, 2 * row + f] + 4) * 0.5
                    for t, f in values_of(plan.layout.grid)
                ]
            )
            for b, row, column in cells_of(plan)
        ]
    )


def plain_standardised(patches: Tensor) -> Tensor:
    rows = []
    for values in patches:
        average = values.sum() / len(values)
        variance = (values - average).square().sum() / (len(values) - 1)
        rows.append((values - average) / (variance + 1e-6).sqrt())
    return torch.stack(rows)


def test_masked_patches_and_rows(case: tuple[Spectrogram, MaskPlan]) -> None:
    spectrogram, plan = case
    got = masked_patches(spectrogram.frames, plan, MEAN, SCALE)
    assert torch.allclose(got, plain_patches(spectrogram, plan), rtol=0, atol=1e-12)
    assert mel_rows(plan).tolist() == [row for _, row, _ in cells_of(plan)]
    assert mel_rows(plan).dtype == torch.int64


def test_standardised(case: tuple[Spectrogram, MaskPlan]) -> None:
    """By the patch's own mean and unbiased variance; a constant patch is 0."""
    patches = plain_patches(*case)
    assert torch.allclose(standardised(patches), plain_standardised(patches), rtol=1e-12, atol=1e-12)
    assert torch.equal(standardised(torch.full((2, 8), 3.5)), torch.zeros(2, 8))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_squared_error(case: tuple[Spectrogram, MaskPlan], norm_pix_loss: bool) -> None:
    spectrogram, plan = case
    target = plain_patches(spectrogram, plan)
    if norm_pix_loss:
        target = plain_standardised(target)
    generator = torch.Generator().manual_seed(1)
    predicted = torch.randn(target.shape, generator=generator, dtype=torch.float64)
    got = squared_error(predicted, spectrogram, plan, MEAN, SCALE, norm_pix_loss=norm_pix_loss)
    assert float(got) == pytest.approx(float((predicted - target).square().sum()), rel=1e-12)


def test_per_bin_mean(case: tuple[Spectrogram, MaskPlan]) -> None:
    """Of plain targets: the mean of each bin over all frames of the batch, also those that no token covers."""
    spectrogram, plan = case
    bins = [(float(spectrogram.frames[:, f].mean()) + 4) * 0.5 for f in range(6)]
    want = torch.tensor(
        [[bins[2 * row + f] for _, f in values_of(plan.layout.grid)] for _, row, _ in cells_of(plan)],
        dtype=torch.float64,
    )
    assert torch.allclose(per_bin_mean(spectrogram, plan, MEAN, SCALE), want, rtol=0, atol=1e-12)


def test_per_bin_mean_of_standardised_targets(case: tuple[Spectrogram, MaskPlan]) -> None:
    """The mean of a bin over the standardised masked patches, which no other constant per bin improves on."""
    spectrogram, plan = case
    targets = plain_standardised(plain_patches(spectrogram, plan))
    cells, values = cells_of(plan), values_of(plan.layout.grid)
    want = torch.empty_like(targets)
    for row in range(3):
        tokens = [i for i, (_, r, _) in enumerate(cells) if r == row]
        for f in range(2):
            places = [j for j, (_, one) in enumerate(values) if one == f]
            want_here = sum(float(targets[i, j]) for i in tokens for j in places) / (
                len(tokens) * len(places)
            )
            for i in tokens:
                want[i, places] = want_here
    got = per_bin_mean(spectrogram, plan, MEAN, SCALE, norm_pix_loss=True)
    assert torch.allclose(got, want, rtol=0, atol=1e-12)
    best = float((got - targets).square().sum())
    for row in range(3):
        for change in (0.01, -0.01):
            moved = got.clone()
            moved[[i for i, (_, r, _) in enumerate(cells) if r == row]] += change
            assert float((moved - targets).square().sum()) > best


@pytest.mark.filterwarnings("ignore:var_mean")
def test_per_bin_mean_of_nothing() -> None:
    """A batch without masked tokens has an empty prediction, of either kind, in the dtype of the frames."""
    for grid in GRIDS.values():
        frames = torch.randn(4, 6)
        spectrogram = Spectrogram(frames, (4,), cumulative((4,), torch.int64, "cpu"), torch.tensor([0]))
        plan = plan_from_ids(grid.layout(spectrogram), [[0, 1, 2]])
        for norm in (True, False):
            got = per_bin_mean(spectrogram, plan, MEAN.float(), SCALE.float(), norm_pix_loss=norm)
            assert got.shape == (0, 8) and got.dtype == torch.float32
