# SPDX-License-Identifier: Apache-2.0
"""The objective of masked autoencoders against its formula in float64, its sums over parts and its trivial
predictor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.masking.plan import plan_from_ids
from masktrain.models.pretrainer import Prediction
from masktrain.objectives.patches import masked_patches, per_bin_mean, standardised
from masktrain.objectives.reconstruction import ReconstructionConfig
from masktrain.objectives.registry import total
from masktrain.types import MaskPlan, Spectrogram, TokenGrid, cumulative

LENGTHS = (12, 8, 21)
MEAN, SCALE = torch.full((1,), -4.0, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
GRIDS = [TokenGrid(freq=2, patch_freq=4, patch_time=3, order=order) for order in ("time", "freq")]


def case(places: list[int], grid: TokenGrid) -> tuple[Spectrogram, MaskPlan, Prediction]:
    """Clips of unequal length; a clip's frames, mask and prediction do not depend on where it stands."""
    lengths = tuple(LENGTHS[b] for b in places)

    def drawn(seed: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    spectrogram = Spectrogram(
        torch.cat([drawn(b, LENGTHS[b], 8) - 4 for b in places]),
        lengths,
        cumulative(lengths, torch.int64, "cpu"),
        torch.tensor(places),
    )
    layout = grid.layout(spectrogram)
    plan = plan_from_ids(layout, [[b % n, (b + 2) % n] for b, n in zip(places, layout.lengths, strict=True)])
    predicted = torch.cat([drawn(50 + b, n, 12) for b, n in zip(places, plan.n_masked, strict=True)])
    return spectrogram, plan, Prediction(torch.empty(0), predicted, None)


@pytest.mark.parametrize("grid", GRIDS, ids=["time", "freq"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_formula(grid: TokenGrid, norm_pix_loss: bool) -> None:
    """The mean over the values of a patch, then over all masked patches."""
    spectrogram, plan, prediction = case([0, 1, 2], grid)
    objective = ReconstructionConfig(norm_pix_loss=norm_pix_loss)
    got = objective.terms(prediction, spectrogram, (plan,), MEAN, SCALE)
    target = masked_patches(spectrogram.frames, plan, MEAN, SCALE)
    if norm_pix_loss:
        target = standardised(target)
    assert prediction.pred_recon is not None
    each = (prediction.pred_recon - target).square().mean(1)
    counts = objective.counts((plan,), grid)
    assert counts == {"mse": sum(plan.n_masked) * 12} and got["mse"].count == counts["mse"]
    assert float(total(got, counts)) == pytest.approx(float(each.mean()), rel=1e-12)
    assert objective.weights == {"mse": 1.0}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_parts_add_up(norm_pix_loss: bool) -> None:
    """Over micro-batches or ranks, with the counts of the whole batch."""
    grid = GRIDS[1]
    objective = ReconstructionConfig(norm_pix_loss=norm_pix_loss)

    def loss(places: list[int], counts: dict[str, int]) -> float:
        spectrogram, plan, prediction = case(places, grid)
        return float(total(objective.terms(prediction, spectrogram, (plan,), MEAN, SCALE), counts))

    each = [objective.counts((case(places, grid)[1],), grid) for places in ([2], [1, 0], [0, 1, 2])]
    assert each[0]["mse"] + each[1]["mse"] == each[2]["mse"]
    assert loss([2], each[2]) + loss([1, 0], each[2]) == pytest.approx(loss([0, 1, 2], each[2]), rel=1e-12)


def test_the_last_plan_is_reconstructed() -> None:
    """Of two plans a clip."""
    grid = GRIDS[0]
    spectrogram, plan, prediction = case([0, 1, 2], grid)
    other = plan_from_ids(plan.layout, [[3], [0, 1], [5]])
    objective = ReconstructionConfig()
    both = objective.terms(prediction, spectrogram, (other, plan), MEAN, SCALE)
    one = objective.terms(prediction, spectrogram, (plan,), MEAN, SCALE)
    assert torch.equal(both["mse"].sum, one["mse"].sum) and both["mse"].count == one["mse"].count
    assert objective.counts((other, plan), grid) == objective.counts((plan,), grid)


@pytest.mark.parametrize("grid", GRIDS, ids=["time", "freq"])
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_per_bin_mean_terms(grid: TokenGrid, norm_pix_loss: bool) -> None:
    """They are the terms of a model that predicts the per-bin mean of the same kind of targets."""
    spectrogram, plan, _ = case([0, 1, 2], grid)
    objective = ReconstructionConfig(norm_pix_loss=norm_pix_loss)
    trivial = per_bin_mean(spectrogram, plan, MEAN, SCALE, norm_pix_loss=norm_pix_loss)
    same = objective.terms(Prediction(torch.empty(0), trivial, None), spectrogram, (plan,), MEAN, SCALE)
    got = objective.per_bin_mean_terms(spectrogram, (plan,), MEAN, SCALE)
    assert float(got["mse"].sum) == pytest.approx(float(same["mse"].sum), rel=1e-12)
    assert got["mse"].count == same["mse"].count
    if norm_pix_loss:
        # standardised values have the mean square 11 / 12, and the mean of bins explains a little of it
        assert 0.5 * 11 / 12 < float(got["mse"].sum) / got["mse"].count < 11 / 12


def test_gradient_reaches_the_prediction() -> None:
    spectrogram, plan, prediction = case([0, 1, 2], GRIDS[0])
    assert prediction.pred_recon is not None
    predicted = prediction.pred_recon.requires_grad_()
    objective = ReconstructionConfig()
    terms = objective.terms(prediction, spectrogram, (plan,), MEAN, SCALE)
    total(terms, objective.counts((plan,), GRIDS[0])).backward()
    target = standardised(masked_patches(spectrogram.frames, plan, MEAN, SCALE))
    want = 2 * (predicted.detach() - target) / predicted.numel()
    assert predicted.grad is not None and torch.allclose(predicted.grad, want, rtol=0, atol=1e-12)


def test_a_model_without_the_head_is_refused() -> None:
    spectrogram, plan, _ = case([0], GRIDS[0])
    with pytest.raises(ConfigError, match="needs a model with a reconstruction head"):
        ReconstructionConfig().terms(
            Prediction(torch.empty(0), None, torch.empty(0)), spectrogram, (plan,), MEAN, SCALE
        )
