# SPDX-License-Identifier: Apache-2.0
"""The objective of masked autoencoders: mean squared error of the masked patches.

The mean over the values of a patch, then over the masked patches of the batch (facebookresearch/mae:
models_mae.py), with the patches as the input is normalised or standardised one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.models.pretrainer import Prediction
from masktrain.objectives.patches import per_bin_mean, squared_error
from masktrain.types import LossTerm, MaskPlan, Spectrogram, TokenGrid


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """What the targets are."""

    norm_pix_loss: bool = True
    """Standardise each target patch by its own mean and unbiased variance (+ 1e-6)."""

    weights: ClassVar[dict[str, float]] = {"mse": 1.0}

    def counts(self, plans: tuple[MaskPlan, ...], grid: TokenGrid) -> dict[str, int]:
        """Return the number of masked values, known before the forward pass."""
        return {"mse": sum(plans[-1].n_masked) * grid.patch_values}

    def terms(
        self,
        prediction: Prediction,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
    ) -> dict[str, LossTerm]:
        """Return the sum over all masked values. mean, scale: as given to the model."""
        if prediction.pred_recon is None:
            raise ConfigError("objective: reconstruction needs a model with a reconstruction head.")
        return self._terms(prediction.pred_recon, spectrogram, plans, mean, scale)

    def per_bin_mean_terms(
        self, spectrogram: Spectrogram, plans: tuple[MaskPlan, ...], mean: Tensor, scale: Tensor
    ) -> dict[str, LossTerm]:
        """Return the term of the predictor that knows only each mel bin's mean over the batch."""
        predicted = per_bin_mean(spectrogram, plans[-1], mean, scale, norm_pix_loss=self.norm_pix_loss)
        return self._terms(predicted, spectrogram, plans, mean, scale)

    def _terms(
        self,
        predicted: Tensor,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
    ) -> dict[str, LossTerm]:
        value = squared_error(
            predicted, spectrogram, plans[-1], mean, scale, norm_pix_loss=self.norm_pix_loss
        )
        count = self.counts(plans, plans[-1].layout.grid)["mse"]
        return {"mse": LossTerm(value, count, self.weights["mse"])}
