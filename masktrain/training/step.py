# SPDX-License-Identifier: Apache-2.0
"""One optimiser step: audio of the micro-batches in, updated weights and the numbers of the step out.

Every loss term is a (sum, count) pair divided by the count over all ranks and micro-batches, and the input
statistics are float64 sums over the same global batch, so one process, several ranks and accumulation compute the
same step. All randomness is keyed by (seed, step, clip id, position), so they also draw the same masks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from masktrain.data.augment import augment
from masktrain.frontend.frontend import Frontend
from masktrain.frontend.length import crop_to, fill_with_silence, pad_to
from masktrain.masking.registry import Strategy
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.masking.view import View
from masktrain.models.pretrainer import Pretrainer
from masktrain.objectives.registry import total
from masktrain.training.distributed import World, no_sync
from masktrain.training.optim import clip_grad
from masktrain.training.precision import Precision
from masktrain.training.recipe import Recipe
from masktrain.training.schedule import Plateau, ResolvedSchedule
from masktrain.training.score_cache import Lookup, ScoreCache
from masktrain.training.step_view import StepView
from masktrain.types import AudioBatch, LossTerm, MaskPlan, Spectrogram, StepKey


@dataclass(frozen=True)
class StepResult:
    """The numbers of one step over the whole batch. loss, parts, grad_norm stay on the device until they are logged.

    baseline: loss and parts of the predictor that knows each mel bin's mean, where they were asked for. clips,
    visible, tokens: how many. padding: tokens that lie in padding. flops: of this step, forward and
    backward, as really done. clips_digest: of the clip ids and their positions in the batch. stop: whether a rank
    was asked to stop. scaled: whether the loss is scaled, so that a step may be skipped.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    grad_norm: Tensor
    lr: float
    baseline: dict[str, Tensor]
    clips: int
    visible: int
    tokens: int
    padding: int
    flops: int
    clips_digest: int
    stop: bool
    scaled: bool


class Step:
    """Runs optimiser steps of a recipe on one rank of the world."""

    def __init__(
        self,
        recipe: Recipe,
        model: Pretrainer,
        optimizer: torch.optim.Optimizer,
        schedule: ResolvedSchedule,
        world: World,
        precision: Precision,
        scores: ScoreCache | None = None,
    ) -> None:
        """scores: what a masking strategy keeps from step to step, where it keeps anything."""
        self.recipe = recipe
        self.objective = recipe.objective
        self.model = model
        self.distributed: nn.Module = world.wrap(model, unused=recipe.model.may_drop_layers)
        self.optimizer = optimizer
        self.schedule = schedule
        self.plateau = Plateau(schedule.config) if schedule.config.kind == "plateau" else None
        self.world = world
        self.precision = precision
        self.scores = scores
        self.frontend = Frontend(recipe.frontend)
        self.grid = recipe.grid
        self.scaler = torch.amp.GradScaler(world.device.type) if precision.scaled else None
        self.dtype = next(model.parameters()).dtype
        self.skipped = 0

    def __call__(
        self, step: int, audio: list[AudioBatch], *, stop: bool = False, baseline: bool = False
    ) -> StepResult:
        """Do step `step` (0-based) with the micro-batches of this rank."""
        key = StepKey.make(self.recipe.seed, step, self.world.device)
        spectrograms = self.fit_lengths([self.spectrogram(a, key) for a in audio], key)
        mean, scale = self._normalisation(spectrograms)
        views = self._views(step, audio, spectrograms, mean, scale)
        plans = [self.plans(view, key) for view in views]
        features = sum(view.done.flops for view in views)
        counts, totals = self._exchange(audio, plans, step, stop, features)
        lr = self.schedule.lr_at(step, self.plateau.reduction if self.plateau else 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = {name: torch.zeros((), dtype=torch.float64, device=self.world.device) for name in counts}
        for i, (spectrogram, masks) in enumerate(zip(spectrograms, plans, strict=True)):
            with no_sync(self.distributed, i + 1 < len(plans)):
                with self.precision.autocast(self.world.device):
                    output = self.distributed(spectrogram, masks, mean, scale, key)
                terms = self.objective.terms(output, spectrogram, masks, mean, scale)
                loss = total(terms, counts)
                _add(parts, terms, counts)
                # DistributedDataParallel averages gradients over ranks; the counts already span the ranks
                scaled = loss * self.world.size
                (self.scaler.scale(scaled) if self.scaler else scaled).backward()

        grad_norm = self._update()
        trivial = self._baseline(spectrograms, plans, mean, scale, counts) if baseline else {}
        parts = self._over_ranks(parts)
        return StepResult(
            loss=parts.pop("loss"),
            parts=parts,
            baseline=trivial,
            grad_norm=grad_norm,
            lr=lr,
            clips=self.recipe.batch_size,
            visible=totals["visible"],
            tokens=totals["tokens"],
            padding=totals["padding"],
            flops=totals["flops"],
            clips_digest=totals["digest"],
            stop=totals["stop"] > 0,
            scaled=self.scaler is not None,
        )

    @torch.no_grad()
    def _baseline(
        self,
        spectrograms: list[Spectrogram],
        plans: list[tuple[MaskPlan, ...]],
        mean: Tensor,
        scale: Tensor,
        counts: dict[str, int],
    ) -> dict[str, Tensor]:
        parts = {name: torch.zeros((), dtype=torch.float64, device=self.world.device) for name in counts}
        for spectrogram, masks in zip(spectrograms, plans, strict=True):
            terms = self.objective.per_bin_mean_terms(spectrogram, masks, mean, scale)
            _add(parts, terms, counts)
        return self._over_ranks(parts)

    def _over_ranks(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the parts of the whole batch and their weighted sum under "loss"."""
        for value in parts.values():
            self.world.sum_(value)
        weights = self.objective.weights
        loss = torch.stack([weights[name] * value for name, value in parts.items()]).sum()
        return {"loss": loss, **parts}

    def plans(self, view: View, key: StepKey, masking: Strategy | None = None) -> tuple[MaskPlan, ...]:
        """Draw the masks of one micro-batch, as many a clip as the model takes. masking: None for the recipe's."""
        layout = self.grid.layout(view.spectrogram)
        strategy = self.recipe.masking if masking is None else masking
        return tuple(strategy.plan(layout, key, draw, view) for draw in range(self.model.config.masks))

    def view(
        self, step: int, spectrogram: Spectrogram, mean: Tensor, scale: Tensor, lookup: Lookup | None = None
    ) -> StepView:
        """Return what a masking strategy may look at in step `step`. lookup: where kept scores of these clips are."""
        masking = self.recipe.masking
        return StepView(
            progress=min(1.0, step / self.schedule.horizon),
            spectrogram=spectrogram,
            mean=mean,
            scale=scale,
            layout=self.grid.layout(spectrogram),
            model=self.model,
            autocast=partial(self.precision.autocast, self.world.device),
            scores=masking.scores if isinstance(masking, SelfGuidedMasking) else None,
            cache=self.scores if lookup is not None else None,
            lookup=lookup,
        )

    def _views(
        self, step: int, audio: list[AudioBatch], spectrograms: list[Spectrogram], mean: Tensor, scale: Tensor
    ) -> list[StepView]:
        lookups: list[Lookup | None] = [None] * len(audio)
        if self.scores is not None:
            lookups[:] = self.scores.lookups(step, audio, [self.grid.layout(s) for s in spectrograms])
        return [
            self.view(step, s, mean, scale, lookup) for s, lookup in zip(spectrograms, lookups, strict=True)
        ]

    def spectrogram(self, audio: AudioBatch, key: StepKey | None = None) -> Spectrogram:
        """Return the log-mel of one micro-batch on the device, in the model's dtype.

        key: of a training step, which draws the recipe's augmentation; None for evaluation, which has none.
        """
        device = self.world.device
        moved = replace(
            audio,
            samples=audio.samples.to(device, non_blocking=True),
            clip_ids=audio.clip_ids.to(device, non_blocking=True),
        )
        if key is not None:
            moved = augment(moved, self.recipe.augment, key)
        if self.recipe.data.padding == "silence":
            assert self.recipe.data.clip_seconds is not None
            moved = fill_with_silence(moved, self.recipe.data.clip_seconds)
        spectrogram = self.frontend(moved, key)
        return replace(spectrogram, frames=spectrogram.frames.to(self.dtype))

    def fit_lengths(self, spectrograms: list[Spectrogram], key: StepKey) -> list[Spectrogram]:
        """Apply the recipe's length policy to the micro-batches of this rank."""
        data = self.recipe.data
        if data.padding == "reference":
            assert data.target_length is not None
            return [pad_to(s, data.target_length, key) for s in spectrograms]
        if data.crop_to_batch_min:
            shortest = min(min(s.lengths) for s in spectrograms)
            shortest = -self.world.max_host([-shortest])[0]
            return [crop_to(s, shortest, key) for s in spectrograms]
        return spectrograms

    def _normalisation(self, spectrograms: list[Spectrogram]) -> tuple[Tensor, Tensor]:
        norm = self.model.input_norm
        if not norm.uses_batch:
            return norm.affine(None)
        sums = torch.stack([norm.statistics(s.frames) for s in spectrograms]).sum(0)
        self.world.sum_(sums)
        norm.update(sums)
        return norm.affine(sums)

    def _exchange(
        self,
        audio: list[AudioBatch],
        plans: list[tuple[MaskPlan, ...]],
        step: int,
        stop: bool,
        features: int,
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Return the loss counts and the totals of the global batch: one small sum over the ranks, on the host.

        features: operations of the feature passes that chose the masks.
        """
        each = [self.objective.counts(masks, self.grid) for masks in plans]
        local_counts = {name: sum(counts[name] for counts in each) for name in each[0]}
        key = StepKey.make(self.recipe.seed, step, "cpu")
        drawn = [plan for masks in plans for plan in masks]
        local = {
            "visible": sum(sum(p.n_visible) for p in drawn),
            "tokens": sum(sum(p.layout.lengths) for p in drawn),
            "padding": sum(self._padding(a, p) for a, masks in zip(audio, plans, strict=True) for p in masks),
            "flops": features + sum(self.model.train_flops(masks, key) for masks in plans),
            "digest": self._digest(audio),
            "stop": int(stop),
        }
        summed = self.world.sum_host([*local_counts.values(), *local.values()])
        counts = dict(zip(local_counts, summed[: len(local_counts)], strict=True))
        totals = dict(zip(local, summed[len(local_counts) :], strict=True))
        totals["digest"] %= 1 << 40
        return counts, totals

    def _padding(self, audio: AudioBatch, plan: MaskPlan) -> int:
        """Tokens of a micro-batch beyond those its audio fills."""
        if self.recipe.data.padding == "none":
            return 0
        config = self.recipe.frontend
        filled = [
            self.grid.tokens(config.frames_for(n, rate))
            for n, rate in zip(audio.lengths, audio.sample_rates, strict=True)
        ]
        return sum(max(0, n - f) for n, f in zip(plan.layout.lengths, filled, strict=True))

    def _digest(self, audio: list[AudioBatch]) -> int:
        """A sum that changes with any clip id, crop or position in the batch, and adds up over ranks."""
        ids = torch.cat([a.clip_ids for a in audio]).tolist()
        starts = torch.cat([a.starts for a in audio]).tolist()
        first = self.world.rank * len(ids)
        mixed = (
            ((first + i + 1) * 0x9E3779B1 ^ (clip + 1) * 0x85EBCA6B ^ (start + 1) * 0xC2B2AE35) % (1 << 40)
            for i, (clip, start) in enumerate(zip(ids, starts, strict=True))
        )
        return sum(mixed) % (1 << 40)

    def _update(self) -> Tensor:
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        norm = clip_grad(self.model.parameters(), self.recipe.optim.clip_norm)
        if self.scaler:
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.skipped += self.scaler.get_scale() < before
        else:
            self.optimizer.step()
        return norm


def _add(parts: dict[str, Tensor], terms: dict[str, LossTerm], counts: dict[str, int]) -> None:
    """Add the share that the terms of a micro-batch have in the parts of the whole batch."""
    for name, term in terms.items():
        parts[name] += term.sum.detach().double() / max(1, counts[name])
