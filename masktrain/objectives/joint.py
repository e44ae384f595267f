# SPDX-License-Identifier: Apache-2.0
"""The joint objective of MAE-AST: squared error of the reconstruction plus InfoNCE of the matching head.

Both on the masked tokens of the same forward pass, 10 : 1 (AlanBaade/MAE-AST-Public:mae_ast/criterions/
mae_ast_criterion.py). The squared error is the mean over all values of all masked patches, InfoNCE the mean
over all masked tokens, its negatives the other masked tokens of the clip. Where clips have different lengths
every token counts the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.kernels.mask_gather import mask_gather
from masktrain.kernels.masked_patch_loss import masked_patch_loss
from masktrain.kernels.patch_info_nce import patch_info_nce
from masktrain.models.mae_ast import MaeAstOutput
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


def weights(config: JointConfig) -> dict[str, float]:
    """Return the weight of each term."""
    return {"mse": config.reconstruction_weight, "info_nce": config.info_nce_weight}


def counts(plan: MaskPlan, grid: TokenGrid) -> dict[str, int]:
    """Return the elements of each term, known before the forward pass: values and masked tokens."""
    masked = sum(plan.n_masked)
    return {"mse": masked * grid.patch_values, "info_nce": masked}


def terms(
    output: MaeAstOutput,
    spectrogram: Spectrogram,
    plan: MaskPlan,
    mean: Tensor,
    scale: Tensor,
    config: JointConfig,
) -> dict[str, LossTerm]:
    """Return the sums of both terms over the masked tokens of `plan`. mean, scale: as given to the model."""
    return _terms(output.pred_recon, output.pred_class, spectrogram, plan, mean, scale, config)


def total(terms: dict[str, LossTerm], global_counts: dict[str, int]) -> Tensor:
    """Return the weighted sum of sum / count, the counts being those of the whole batch: over all
    micro-batches and ranks it adds up to the loss."""
    return torch.stack(
        [term.weight * term.sum / max(1, global_counts[name]) for name, term in terms.items()]
    ).sum()


def per_bin_mean_terms(
    spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, config: JointConfig
) -> dict[str, LossTerm]:
    """Return the terms of the predictor that knows only each mel bin's mean over the batch, on both heads."""
    average = spectrogram.frames.mean(0, keepdim=True).expand_as(spectrogram.frames)
    predicted = _patches(average, plan, mean, scale)
    return _terms(predicted, predicted, spectrogram, plan, mean, scale, config)


def _terms(
    reconstructed: Tensor,
    matched: Tensor,
    spectrogram: Spectrogram,
    plan: MaskPlan,
    mean: Tensor,
    scale: Tensor,
    config: JointConfig,
) -> dict[str, LossTerm]:
    layout = plan.layout
    sums = {
        "mse": masked_patch_loss(
            reconstructed,
            spectrogram.frames,
            layout.cu_frames,
            layout.cu_tokens,
            plan.masked,
            mean=mean,
            scale=scale,
            **_grid(layout.grid),
        ),
        "info_nce": patch_info_nce(
            matched,
            _patches(spectrogram.frames, plan, mean, scale),
            plan.cu_masked,
            plan.n_masked,
            axis=config.info_nce_axis,
        ),
    }
    number, weight = counts(plan, layout.grid), weights(config)
    return {name: LossTerm(value, number[name], weight[name]) for name, value in sums.items()}


def _patches(frames: Tensor, plan: MaskPlan, mean: Tensor, scale: Tensor) -> Tensor:
    """Return the normalised masked patches (M, P)."""
    layout = plan.layout
    return mask_gather(
        frames,
        layout.cu_frames,
        layout.cu_tokens,
        plan.masked,
        mean=mean,
        scale=scale,
        **_grid(layout.grid),
    )


def _grid(grid: TokenGrid) -> dict[str, Any]:
    return {
        "freq": grid.freq,
        "patch_freq": grid.patch_freq,
        "patch_time": grid.patch_time,
        "order": grid.order,
    }
