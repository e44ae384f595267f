# SPDX-License-Identifier: Apache-2.0
"""The learning rate as a function of the step, and every horizon of a recipe, scaled with the run length.

A recipe stores its horizons (warm-up, decay, EMA ramps) with the run length they were published for. A run of
another length keeps the fractions; with `scaling="absolute"` it keeps the counts.

With W warm-up updates, N updates in all and s = 0, 1, ... N - 1 updates made, the factor on the peak is
  warm-up  s < W:   (s + 1) / (W + 1)
  linear   s >= W:  (N - s) / (N - W)
  plateau  s >= W:  1
  cosine   s >= W:  sin^2(pi/2 (N - s) / (N - W)), from the peak to `min_lr`: the half cosine
                    1/2 (1 + cos(pi (s - W) / (N - W))) without its cancellation at the end
so the first and the last update both move the weights, and the peak is reached once, at s = W (plateau: from there
on). Under plateau the rate is multiplied by `factor` each time that the loss of the held-out clips has not improved
for more than `patience` evaluations: the rule of torch.optim.lr_scheduler.ReduceLROnPlateau. The polynomial schedule
of power 1 in fairseq (facebookresearch/fairseq, optim/lr_scheduler/polynomial_decay_schedule.py) has the same peak
and decay as linear; its warm-up is s / W, so that its first update is made at rate 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from masktrain.errors import ConfigError

# Scaled evaluations are no closer: from one update to the next the held-out loss moves up and down more than it falls,
# so that a plateau would be seen at once (after 28 of 160 steps the rate was an eighth).
LEAST_INTERVAL = 20
THRESHOLD = 1e-4  # a plateau's loss improves where it falls by more than this share of the best


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The published schedule and how it is brought to another run length."""

    kind: Literal["linear", "cosine", "plateau"]
    """After the linear warm-up: straight to 0, half a cosine to min_lr, or constant until the loss of the held-out
    clips no longer improves, and then times `factor` each time."""
    warmup_steps: int
    """Published warm-up, in updates."""
    total_steps: int
    """Published run length, in updates."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine, and the least of a plateau."""
    factor: float = 0.5
    """Of kind plateau: what the learning rate is multiplied by."""
    patience: int = 2
    """Of kind plateau: evaluations without improvement that change nothing; the next one lowers the rate."""
    evaluate_every: int | None = None
    """Published updates between evaluations of the held-out clips; None: start, middle and end alone."""
    scaling: Literal["fraction", "absolute"] = "fraction"
    """fraction: horizons keep their share of the run. absolute: they keep their published counts."""

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise ConfigError(f"schedule.total_steps: must be at least 1; received {self.total_steps}.")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ConfigError(
                f"schedule.warmup_steps: must lie between 0 and total_steps ({self.total_steps}); "
                f"received {self.warmup_steps}."
            )
        if not (math.isfinite(self.min_lr) and self.min_lr >= 0):
            raise ConfigError(f"schedule.min_lr: must be at least 0; received {self.min_lr}.")
        if not 0 < self.factor < 1:
            raise ConfigError(f"schedule.factor: must lie between 0 and 1; received {self.factor}.")
        if self.patience < 0:
            raise ConfigError(f"schedule.patience: must be at least 0; received {self.patience}.")
        if self.evaluate_every is not None and not 1 <= self.evaluate_every <= self.total_steps:
            raise ConfigError(
                f"schedule.evaluate_every: must lie between 1 and total_steps ({self.total_steps}); received "
                f"{self.evaluate_every}."
            )
        if self.kind == "plateau" and self.evaluate_every is None:
            raise ConfigError(
                "schedule.evaluate_every: kind plateau needs the updates between evaluations of the held-out clips."
            )
        if self.kind == "linear" and self.min_lr:
            raise ConfigError(
                f"schedule.min_lr: the linear decay ends at 0; received {self.min_lr}. "
                "Leave it at 0 or take schedule.kind cosine."
            )


@dataclass(frozen=True)
class ResolvedSchedule:
    """The schedule of one run. lr: the peak. steps: updates of the run. warmup: updates before the peak.
    horizon: updates before the end of the decay, at least `steps` (under plateau nothing ends there).
    evaluate_every: updates between evaluations of the held-out clips."""

    config: ScheduleConfig
    lr: float
    steps: int
    warmup: int
    horizon: int
    evaluate_every: int | None = None

    def milestone(self, done: int) -> bool:
        """Whether `done` updates are the start, the middle or the end of the run."""
        return done in (0, (self.steps + 1) // 2, self.steps)

    def watched(self, done: int) -> bool:
        """Whether the held-out clips are evaluated after `done` updates because of evaluate_every."""
        return self.evaluate_every is not None and done > 0 and done % self.evaluate_every == 0

    def lr_at(self, step: int, reduction: float = 1.0) -> float:
        """Return the rate of the update that follows `step` updates; 0 <= step < steps, always above 0.

        reduction: what a plateau has lowered it to so far (`Plateau.reduction`).
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"lr_at: step must lie in [0, {self.steps}); received {step}")
        if step < self.warmup:
            return self.lr * ((step + 1) / (self.warmup + 1))
        if self.config.kind == "plateau":
            return max(self.lr * reduction, self.config.min_lr)
        left = (self.horizon - step) / (self.horizon - self.warmup)
        if self.config.kind == "linear":
            return self.lr * left
        return self.config.min_lr + (self.lr - self.config.min_lr) * math.sin(0.5 * math.pi * left) ** 2

    def describe(self) -> list[str]:
        """Return the lines of the start block: the schedule, what was scaled, what does not fit."""
        config = self.config
        end = f"{config.min_lr:.3g}" if config.kind == "cosine" else "0"
        after = f"{config.kind} decay to {end} at step {self.horizon}"
        if config.kind == "plateau":
            least = f", down to {config.min_lr:.3g}" if config.min_lr else ""
            after = (
                f"then times {config.factor:g}{least} whenever the loss of the held-out clips, evaluated every "
                f"{self.evaluate_every} steps, has not improved for more than {config.patience} evaluations"
            )
        warmup = (
            f"warm-up of {self.warmup} steps to {self.lr:.3g}, " if self.warmup else f"from {self.lr:.3g}, "
        )
        lines = [f"learning rate: {warmup}{after}"]
        if self.steps == config.total_steps:
            lines.append("run length: as published; nothing is scaled")
        elif config.scaling == "fraction":
            change = f"run length {config.total_steps} -> {self.steps} steps (as published x "
            change += f"{self.steps / config.total_steps:.3g})"
            if config.warmup_steps:
                change += f", warm-up {config.warmup_steps} -> {self.warmup} steps"
            if config.evaluate_every:
                change += f", evaluations every {config.evaluate_every} -> {self.evaluate_every} steps"
            lines.append(f"scaled: {change}")
        else:
            lines.append(
                f"run length: {self.steps} of the published {config.total_steps} steps; nothing is scaled "
                "(schedule.scaling absolute)"
            )
            if self.steps <= self.warmup:
                lines.append(
                    f"warning: the run ends inside the warm-up, at a learning rate of "
                    f"{self.lr_at(self.steps - 1):.3g} of {self.lr:.3g}; schedule.scaling fraction scales it"
                )
        return lines


def resolve(config: ScheduleConfig, steps: int, lr: float) -> ResolvedSchedule:
    """Return the schedule of a run of `steps` updates whose peak learning rate is `lr`.

    Raises ConfigError for a run that outlasts an absolute schedule, and for a peak below `min_lr`.
    """
    if steps < 1:
        raise ConfigError(f"--steps: must be at least 1; received {steps}.")
    if lr < config.min_lr:
        raise ConfigError(
            f"schedule.min_lr: {config.min_lr:.3g} is above the peak learning rate of {lr:.3g}; lower it."
        )
    if config.scaling == "fraction":
        warmup = scale_horizon(config.warmup_steps, config.total_steps, steps)
        every = config.evaluate_every
        if every is not None:
            scaled = scale_horizon(every, config.total_steps, steps)
            every = max(scaled, min(every, LEAST_INTERVAL))
        return ResolvedSchedule(config, lr, steps, warmup, steps, every)
    if steps > config.total_steps and config.kind != "plateau":
        raise ConfigError(
            f"--steps: {steps} steps are more than the {config.total_steps} of schedule.total_steps, after "
            "which the learning rate would be 0. Lower --steps, raise schedule.total_steps, or use "
            "schedule.scaling fraction."
        )
    return ResolvedSchedule(config, lr, steps, config.warmup_steps, config.total_steps, config.evaluate_every)


class Plateau:
    """What a plateau schedule knows of the held-out loss. reduction: what the rate is multiplied by, 1 at first."""

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.best: float | None = None
        self.bad = 0
        self.reduction = 1.0

    def watch(self, loss: float) -> bool:
        """Take in the loss of an evaluation and return whether it lowers the rate.

        torch.optim.lr_scheduler.ReduceLROnPlateau with its threshold of 1e-4 of the best loss, and without its bound
        on how small a change of the rate may be. NaN is no improvement.
        """
        if loss < (math.inf if self.best is None else self.best * (1 - THRESHOLD)):
            self.best, self.bad = loss, 0
            return False
        self.bad += 1
        if self.bad <= self.config.patience:
            return False
        self.bad = 0
        self.reduction *= self.config.factor
        return True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds."""
        return {"best": self.best, "bad": self.bad, "reduction": self.reduction}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. Raises KeyError or TypeError for anything else."""
        best, bad, reduction = state["best"], state["bad"], state["reduction"]
        if type(bad) is not int or type(reduction) is not float or not isinstance(best, float | None):
            raise TypeError(f"plateau: {state!r}")
        self.best, self.bad, self.reduction = best, bad, reduction


def scale_horizon(count: int, published: int, steps: int) -> int:
    """Return `count` of `published` updates as the same share of `steps`, rounded.

    At least 1 where the published count is: a warm-up stays one.
    """
    return max((2 * count * steps + published) // (2 * published), min(count, 1))
