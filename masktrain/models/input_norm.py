# SPDX-License-Identifier: Apache-2.0
"""Normalisation of the log-mel before it is cut into patches: value = (frame - mean) * scale.

The ops apply it while they read patches, so this module only says what mean and scale are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from masktrain.errors import ConfigError

EPS = 1e-5
MOMENTUM = 0.1


@dataclass(frozen=True, kw_only=True)
class InputNormConfig:
    """Where mean and scale of the log-mel come from."""

    kind: Literal["batch", "global", "per_bin"]
    """batch: one mean and variance over all frames and bins of the global batch, running values in
    evaluation; global: dataset_mean and dataset_std; per_bin: a mean and a standard deviation of each mel bin,
    measured on clips of the training set before the first step and kept with the weights."""
    factor: float = 0.5
    """Standard deviation after normalisation (0.5 in the AST family)."""
    dataset_mean: float | None = None
    """Mean of the training set's log-mel, for kind global."""
    dataset_std: float | None = None
    """Standard deviation of the training set's log-mel, for kind global."""
    std_floor: float = 0.1
    """Least standard deviation of a bin, for kind per_bin: bins at the floor of the logarithm have almost none, and
    to divide by it magnifies whatever another file has there."""
    measured_clips: int = 10_000
    """Clips that kind per_bin is measured on, or all where there are fewer."""

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ConfigError(f"input_norm.factor: must be above 0; received {self.factor!r}.")
        given = self.dataset_mean is not None, self.dataset_std is not None
        if self.kind == "global" and not all(given):
            raise ConfigError(
                "input_norm: kind 'global' needs dataset_mean and dataset_std; received "
                f"{self.dataset_mean!r} and {self.dataset_std!r}. Measure them, or take kind 'batch'."
            )
        if self.kind != "global" and any(given):
            raise ConfigError(
                f"input_norm: kind {self.kind!r} measures its own, without dataset_mean or dataset_std; received "
                f"{self.dataset_mean!r} and {self.dataset_std!r}. Remove them, or take kind 'global'."
            )
        if not self.std_floor > 0:
            raise ConfigError(f"input_norm.std_floor: must be above 0; received {self.std_floor!r}.")
        if self.measured_clips < 1:
            raise ConfigError(
                f"input_norm.measured_clips: must be at least 1; received {self.measured_clips}."
            )
        if self.dataset_std is not None and not self.dataset_std > 0:
            raise ConfigError(f"input_norm.dataset_std: must be above 0; received {self.dataset_std!r}.")


class InputNorm(nn.Module):
    """Mean and scale of the log-mel.

    Kind "batch" is torch's BatchNorm2d(1, affine=False) times `factor` (AlanBaade/MAE-AST-Public:
    mae_ast/models/mae_ast.py): biased variance, eps 1e-5, running values with momentum 0.1 and unbiased
    variance. Its statistics are sums, so that micro-batches and ranks add up to those of the global batch.
    Kind "global" is (x - dataset_mean) / (dataset_std / factor) (YuanGongND/ast:src/dataloader.py), kind "per_bin"
    the same bin by bin (WangHelin1997/MaskSpec:models/models_mae.py).
    """

    mean: Tensor
    scale: Tensor
    running_mean: Tensor
    running_var: Tensor
    bin_mean: Tensor
    bin_std: Tensor

    def __init__(self, config: InputNormConfig, bins: int) -> None:
        """bins: mel bins of the front end."""
        super().__init__()
        self.config = config
        if self.uses_batch:
            self.register_buffer("running_mean", torch.zeros(1))
            self.register_buffer("running_var", torch.ones(1))
        elif config.kind == "per_bin":
            self.register_buffer("bin_mean", torch.zeros(bins))
            self.register_buffer("bin_std", torch.ones(bins))
        else:
            assert config.dataset_mean is not None and config.dataset_std is not None
            self.register_buffer("mean", torch.tensor([config.dataset_mean]), persistent=False)
            self.register_buffer(
                "scale", torch.tensor([config.factor / config.dataset_std]), persistent=False
            )

    @property
    def uses_batch(self) -> bool:
        """Whether training needs the statistics of the batch."""
        return self.config.kind == "batch"

    def statistics(self, frames: Tensor) -> Tensor:
        """Return (3,) float64 [count, sum, sum of squares] of all values of packed frames (T, F); they add
        up."""
        values = frames.double()
        count = torch.full((), values.numel(), dtype=torch.float64, device=frames.device)
        return torch.stack([count, values.sum(), values.square().sum()])

    def affine(self, statistics: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and scale, (1,) each, of the statistics of a batch, or of the running values for None.

        The other kinds take None only and answer the same always; for "per_bin" both are (F,).
        """
        if self.config.kind == "per_bin":
            return self.bin_mean, self.config.factor / self.bin_std.clamp(min=self.config.std_floor)
        if not self.uses_batch:
            return self.mean, self.scale
        if statistics is None:
            return self.running_mean.clone(), self.config.factor / torch.sqrt(self.running_var + EPS)
        mean, variance = _moments(statistics)
        scale = self.config.factor / torch.sqrt(variance + EPS)
        return mean.to(self.running_mean.dtype), scale.to(self.running_mean.dtype)

    @torch.no_grad()
    def set_bins(self, mean: Tensor, std: Tensor) -> None:
        """Take the measured mean and standard deviation (F,) of each bin, for kind "per_bin"."""
        self.bin_mean.copy_(mean)
        self.bin_std.copy_(std)

    @torch.no_grad()
    def update(self, statistics: Tensor) -> None:
        """Move the running values towards those of the global batch."""
        mean, variance = _moments(statistics)
        count = statistics[0]
        unbiased = variance * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), MOMENTUM)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), MOMENTUM)


def _moments(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, (1,) float64 each."""
    count, total, squares = statistics.unbind()
    count = count.clamp(min=1)
    mean = total / count
    return mean.reshape(1), (squares / count - mean.square()).clamp(min=0).reshape(1)
