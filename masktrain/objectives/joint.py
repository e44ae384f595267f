# SPDX-License-Identifier: Apache-2.0
"""The joint objective of SSAST and MAE-AST: squared error of the reconstruction plus InfoNCE of the matching head.

10 : 1 in both (AlanBaade/MAE-AST-Public:mae_ast/criterions/mae_ast_criterion.py, YuanGongND/ssast:
src/traintest_mask.py). The squared error is the mean over all values of all masked patches, InfoNCE the mean
over all masked tokens, its negatives the other masked tokens of the clip. Where clips have different lengths
every token counts the same. A model with two masks a clip is matched under the first and reconstructs under the
second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.kernels.patch_info_nce import patch_info_nce
from masktrain.models.pretrainer import Prediction
from masktrain.objectives.patches import masked_patches, per_bin_mean, squared_error
from masktrain.types import LossTerm, MaskPlan, Spectrogram, TokenGrid


@dataclass(frozen=True, kw_only=True)
class JointConfig:
    """Weights of the two terms and the axis of the softmax."""

    reconstruction_weight: float = 10.0
    """Weight of the mean squared error."""
    info_nce_weight: float = 1.0
    """Weight of InfoNCE."""
    info_nce_axis: Literal["targets", "predictions"] = "targets"
    """The softmax of a prediction runs over targets (the paper), or that of a target over predictions
    (SSAST)."""

    def __post_init__(self) -> None:
        for name in ("reconstruction_weight", "info_nce_weight"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"objective.{name}: must be at least 0; received {getattr(self, name)}.")
        if not self.reconstruction_weight + self.info_nce_weight > 0:
            raise ConfigError(
                "objective: reconstruction_weight and info_nce_weight are both 0; one must be above 0."
            )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {"mse": self.reconstruction_weight, "info_nce": self.info_nce_weight}

    def counts(self, plans: tuple[MaskPlan, ...], grid: TokenGrid) -> dict[str, int]:
        """Return the elements of each term, known before the forward pass: values and masked tokens."""
        return {"mse": sum(plans[-1].n_masked) * grid.patch_values, "info_nce": sum(plans[0].n_masked)}

    def terms(
        self,
        prediction: Prediction,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
    ) -> dict[str, LossTerm]:
        """Return the sums of both terms over the masked tokens. mean, scale: as given to the model."""
        if prediction.pred_recon is None or prediction.pred_class is None:
            raise ConfigError("objective: the joint objective needs a model with two heads.")
        return self._terms(prediction.pred_recon, prediction.pred_class, spectrogram, plans, mean, scale)

    def per_bin_mean_terms(
        self, spectrogram: Spectrogram, plans: tuple[MaskPlan, ...], mean: Tensor, scale: Tensor
    ) -> dict[str, LossTerm]:
        """Return the terms of the predictor that knows only each mel bin's mean over the batch, on both heads."""
        recon = per_bin_mean(spectrogram, plans[-1], mean, scale)
        matched = recon if len(plans) == 1 else per_bin_mean(spectrogram, plans[0], mean, scale)
        return self._terms(recon, matched, spectrogram, plans, mean, scale)

    def _terms(
        self,
        reconstructed: Tensor,
        matched: Tensor,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
    ) -> dict[str, LossTerm]:
        first = plans[0]
        sums = {
            "mse": squared_error(reconstructed, spectrogram, plans[-1], mean, scale),
            "info_nce": patch_info_nce(
                matched,
                masked_patches(spectrogram.frames, first, mean, scale),
                first.cu_masked,
                first.n_masked,
                axis=self.info_nce_axis,
            ),
        }
        number = self.counts(plans, first.layout.grid)
        return {name: LossTerm(value, number[name], self.weights[name]) for name, value in sums.items()}
