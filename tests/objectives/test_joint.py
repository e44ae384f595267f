# SPDX-License-Identifier: Apache-2.0
"""The joint objective against its formula in float64, its counts and sums over parts, and the per-bin-mean
predictor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.masking.plan import plan_from_ids
from masktrain.models.pretrainer import Prediction
from masktrain.objectives.joint import JointConfig
from masktrain.objectives.registry import total
from masktrain.types import MaskPlan, Spectrogram, TokenGrid, cumulative

GRID = TokenGrid(freq=2, patch_freq=4, patch_time=3, order="time")
LENGTHS = (12, 8, 21)
MEAN, SCALE = torch.full((1,), -4.0, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)


def clip(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(LENGTHS[number], 8, generator=generator, dtype=torch.float64) - 4


def case(places: list[int]) -> tuple[Spectrogram, MaskPlan, Prediction]:
    lengths = tuple(LENGTHS[b] for b in places)
    spectrogram = Spectrogram(
        torch.cat([clip(b) for b in places]),
        lengths,
        cumulative(lengths, torch.int64, "cpu"),
        torch.tensor(places),
    )
    layout = GRID.layout(spectrogram)
    plan = plan_from_ids(layout, [[b % n, (b + 2) % n] for b, n in zip(places, layout.lengths, strict=True)])
    heads = [
        torch.cat(
            [
                torch.randn(
                    n, 12, generator=torch.Generator().manual_seed(50 * side + b), dtype=torch.float64
                )
                for b, n in zip(places, plan.n_masked, strict=True)
            ]
        )
        for side in (1, 2)
    ]
    return spectrogram, plan, Prediction(torch.empty(0), *heads)


def targets(number: int) -> Tensor:
    """(tokens, 12) normalised patches of one clip by plain slicing; the last column of clip 1 is partly
    empty."""
    frames = (clip(number) + 4) * 0.5
    columns = GRID.columns(len(frames))
    full = torch.zeros(columns * 3, 8, dtype=torch.float64)
    full[: len(frames)] = frames[: columns * 3]
    return torch.stack(
        [full[3 * c : 3 * c + 3, 4 * r : 4 * r + 4].flatten() for c in range(columns) for r in (0, 1)]
    )


@pytest.mark.parametrize("axis", ["targets", "predictions"])
def test_formula(axis: str) -> None:
    places = [0, 1, 2]
    spectrogram, plan, output = case(places)
    config = JointConfig(info_nce_axis=axis)
    got = config.terms(output, spectrogram, (plan,), MEAN, SCALE)
    squares, nce, start = 0.0, 0.0, 0
    for b, n in zip(places, plan.layout.lengths, strict=True):
        masked = [t for t in range(n) if t not in (b % n, (b + 2) % n)]
        want = targets(b)[masked]
        rows = slice(start, start + len(masked))
        squares += float((output.pred_recon[rows] - want).square().sum())
        logits = output.pred_class[rows] @ want.T
        nce -= float(torch.log_softmax(logits, 1 if axis == "targets" else 0).diagonal().sum())
        start += len(masked)
    assert float(got["mse"].sum) == pytest.approx(squares, rel=1e-12)
    assert float(got["info_nce"].sum) == pytest.approx(nce, rel=1e-12)
    assert {k: t.count for k, t in got.items()} == {"mse": start * 12, "info_nce": start}
    assert config.counts((plan,), GRID) == {"mse": start * 12, "info_nce": start}
    loss = total(got, config.counts((plan,), GRID))
    assert float(loss) == pytest.approx(10 * squares / (12 * start) + nce / start, rel=1e-12)


def test_parts_add_up() -> None:
    """Over micro-batches or ranks, with the counts of the whole batch."""
    config = JointConfig(reconstruction_weight=3.0, info_nce_weight=0.5)
    spectrogram, plan, output = case([0, 1, 2])
    counts = config.counts((plan,), GRID)
    whole = total(config.terms(output, spectrogram, (plan,), MEAN, SCALE), counts)
    parts = torch.zeros((), dtype=torch.float64)
    summed = dict.fromkeys(counts, 0)
    for places in ([2], [1, 0]):
        spectrogram, plan, output = case(places)
        for name, number in config.counts((plan,), GRID).items():
            summed[name] += number
        parts += total(config.terms(output, spectrogram, (plan,), MEAN, SCALE), counts)
    assert summed == counts
    assert float(parts) == pytest.approx(float(whole), rel=1e-12)


@pytest.mark.parametrize("order", ["time", "freq"])
def test_per_bin_mean(order: str) -> None:
    """Without time structure the predictor is perfect; with it, its error is the variance around each bin's
    mean."""
    grid = TokenGrid(freq=2, patch_freq=4, patch_time=3, order=order)
    bins = torch.linspace(-8, -1, 8, dtype=torch.float64)
    config = JointConfig()
    for noise in (0.0, 1.0):
        wave = noise * torch.tensor([1.0, 0.0, -1.0] * 4, dtype=torch.float64)[:, None]
        frames = bins.expand(12, 8) + wave
        spectrogram = Spectrogram(frames, (12,), cumulative((12,), torch.int64, "cpu"), torch.tensor([0]))
        plan = plan_from_ids(grid.layout(spectrogram), [[0]])
        got = config.per_bin_mean_terms(spectrogram, (plan,), MEAN, SCALE)
        each = float(got["mse"].sum) / got["mse"].count
        # values are halved: two thirds of the frames are off by noise / 2
        assert each == pytest.approx(noise**2 / 4 * 2 / 3, abs=1e-12)
        assert got["mse"].count == 7 * 12 and got["info_nce"].count == 7
        # the same prediction for all tokens of a row: its softmax cannot tell the row's tokens apart
        assert float(got["info_nce"].sum) >= 7 * 0.9


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reconstruction_weight": -1.0}, "reconstruction_weight: must be at least 0; received -1.0"),
        ({"reconstruction_weight": 0.0, "info_nce_weight": 0.0}, "are both 0"),
    ],
)
def test_bad_config(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        JointConfig(**change)
