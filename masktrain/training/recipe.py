# SPDX-License-Identifier: Apache-2.0
"""A recipe: everything that a run does, as one frozen tree of the components' own configs.

A recipe is a function in masktrain/recipes/ that returns a `Recipe`; a variant is `replace(parent(), ...)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import tyro

from masktrain.data.augment import AugmentConfig
from masktrain.data.config import DataConfig
from masktrain.errors import ConfigError
from masktrain.frontend.config import FrontendConfig
from masktrain.masking.registry import Strategy
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.registry import ModelConfig
from masktrain.objectives.registry import Objective
from masktrain.training.optim import OptimConfig
from masktrain.training.schedule import ScheduleConfig
from masktrain.types import Order, TokenGrid


@dataclass(frozen=True, kw_only=True)
class TokenConfig:
    """How the spectrogram is cut into patches."""

    patch_freq: int
    """Mel bins of a patch."""
    patch_time: int
    """Frames of a patch."""
    order: Order
    """Outer axis of the token order and of the values inside a patch."""
    partial: Literal["half", "drop"] = "half"
    """A last column that the clip does not fill: kept if at least half of it is filled, or dropped."""

    def grid(self, n_mels: int) -> TokenGrid:
        """Return the token grid over `n_mels` mel bins."""
        if self.patch_freq < 1 or self.patch_time < 1:
            raise ConfigError(
                f"tokens.patch_freq and tokens.patch_time must be at least 1; received {self.patch_freq} and "
                f"{self.patch_time}."
            )
        if n_mels % self.patch_freq:
            raise ConfigError(
                f"tokens.patch_freq: {self.patch_freq} mel bins a patch do not divide the front end's {n_mels}; "
                f"choose a divisor of {n_mels}."
            )
        return TokenGrid(
            freq=n_mels // self.patch_freq,
            patch_freq=self.patch_freq,
            patch_time=self.patch_time,
            order=self.order,
            partial=self.partial,
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What the loop does beside the method."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Compute type: auto takes bf16 where the GPU has it, fp16 with loss scaling on older GPUs, fp32 on the CPU."""
    steps: tyro.conf.Suppress[int | None] = None
    """Steps of the run; None: as published. Every horizon of the schedule scales with it."""
    accumulation: int = 1
    """Micro-batches per step; the result does not depend on it."""
    log_every: int | None = None
    """Steps between logged rows; the first ten steps and the last are always logged. None: 1 up to 1000 steps, else 50."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; None: ten in a run, and one at its end."""
    keep_last: int = 3
    """Checkpoints kept."""
    pictures: int = 4
    """Held-out clips drawn at the start, the middle and the end: the one with the median error, and others from short
    to long; 0 draws no picture at all."""
    validation_clips: int | None = None
    """Clips held out of training; None: 2 % of the manifest, from 4 to 256 (none of a manifest under 20 clips)."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "checkpoint_every", "keep_last"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"train.{name}: must be at least 1; received {value}.")
        for name in ("pictures", "validation_clips"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"train.{name}: must be at least 0; received {value}.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run, complete."""

    name: tyro.conf.Suppress[str]
    """The recipe's name."""
    size: tyro.conf.Suppress[str]
    """Named size of model, batch and learning rate: tiny, small or base."""
    paper: tyro.conf.Suppress[str]
    """The publication that it follows."""
    code: tyro.conf.Suppress[str]
    """The reference code that it follows."""
    readings: tyro.conf.Suppress[tuple[str, ...]] = ()
    """Where paper and code disagree or a value is not obvious: what was taken, and from where."""
    sources: tyro.conf.Suppress[tuple[tuple[str, str], ...]] = ()
    """(dotted field, or group of fields, of this recipe; where its value at size base is from): a file of the code as
    owner/name:path, or a section of the paper."""
    batch_size: tyro.conf.Suppress[int]
    """Clips of one step over all ranks and micro-batches."""
    seed: tyro.conf.Suppress[int] = 0
    """Seed of every random choice, 0 to 2^48 - 1."""
    frontend: FrontendConfig
    data: DataConfig
    tokens: TokenConfig
    input_norm: InputNormConfig
    masking: Strategy
    model: ModelConfig
    objective: Objective
    optim: OptimConfig
    schedule: ScheduleConfig
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: must be at least 1; received {self.batch_size}.")
        if not 0 <= self.seed < 1 << 48:
            raise ConfigError(f"seed: must lie in [0, 2^48); received {self.seed}.")

    def source(self, field: str) -> str:
        """Return where the value of a dotted field is from: its own entry of `sources`, else that of the innermost
        group that has one, else ""."""
        known = dict(self.sources)
        while field and field not in known:
            field = field.rpartition(".")[0]
        return known.get(field, "")

    @property
    def grid(self) -> TokenGrid:
        """The token grid."""
        return self.tokens.grid(self.frontend.n_mels)
