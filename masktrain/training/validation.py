# SPDX-License-Identifier: Apache-2.0
"""Held-out clips: how far the model is from them, beside two predictors that learn nothing, and their pictures.

The clips, their crops and their masks are the same at every evaluation, and their input statistics are those of the
held-out clips themselves, so that the evaluations of a run can be compared. A strategy whose masks change over the run
serves as at the run's end; in the place of one that looks at clips stand random masks (`step_view.for_evaluation`).

Beside its losses an evaluation has the squared error of the masked values of the normalised log-mel, the same quantity
for every recipe that reconstructs: of the model, of the per-bin mean and of linear interpolation in time between the
visible frames. A model whose targets are standardised patch by patch (norm_pix_loss) predicts neither level nor
contrast of a patch. Both are put back as far as the visible context tells them (`visible_levels`); to take those of the
true patch, as published viewers do, would tell the model most of the answer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.masking.view import View
from masktrain.objectives.patches import (
    clip_errors,
    destandardised,
    interpolated,
    masked_patches,
    visible_levels,
)
from masktrain.training.pictures import Reconstruction, Validation, mask_grids
from masktrain.training.step import Step
from masktrain.training.step_view import for_evaluation
from masktrain.types import AudioBatch, MaskPlan, StepKey

# a step that no run reaches: keeps these masks apart from those of training
KEY_STEP = 0xFFFFFFFF


class Validator:
    """Evaluates the model of a step on held-out audio."""

    def __init__(self, step: Step, audio: list[AudioBatch], names: list[str], pictures: int) -> None:
        """names: the path of each clip id. pictures: how many clips are drawn, the one with the median error and others
        from short to long."""
        self.step = step
        self.names = [os.path.basename(name) for name in names]
        key = StepKey.make(step.recipe.seed, KEY_STEP, step.world.device)
        self.spectrograms = step.fit_lengths([step.spectrogram(a) for a in audio], key)
        norm = step.model.input_norm
        sums = torch.stack([norm.statistics(s.frames) for s in self.spectrograms]).sum(0)
        self.mean, self.scale = norm.affine(sums if norm.uses_batch else None)
        masking = for_evaluation(step.recipe.masking)
        views = [View(1.0, s, self.mean, self.scale) for s in self.spectrograms]
        self.plans = [step.plans(view, key, masking) for view in views]
        self.pictures = pictures
        self.by_length = spread([n for s in self.spectrograms for n in s.lengths], max(0, pictures - 1))
        each = [step.objective.counts(masks, step.grid) for masks in self.plans]
        self.counts = {name: sum(counts[name] for counts in each) for name in each[0]}
        self.baseline_parts = self._baseline()
        self.values = [n * step.grid.patch_values for masks in self.plans for n in masks[-1].n_masked]
        self._measure_references()

    @torch.no_grad()
    def _measure_references(self) -> None:
        """Measure the two predictors that no model changes, and keep what brings back standardised patches."""
        standardised = getattr(self.step.objective, "norm_pix_loss", False)
        # of all clips: that of a batch would depend on the batch size
        sums = torch.stack([s.frames.double().sum(0) for s in self.spectrograms]).sum(0)
        bin_mean = (sums / max(1, sum(len(s.frames) for s in self.spectrograms))).to(self.step.dtype)
        self.levels: list[tuple[Tensor, Tensor] | None] = []
        self.sums_bin_mean: list[float] = []
        self.sums_interpolation: list[float] = []
        for spectrogram, masks in zip(self.spectrograms, self.plans, strict=True):
            plan = masks[-1]
            targets = masked_patches(spectrogram.frames, plan, self.mean, self.scale)
            average = masked_patches(bin_mean.expand_as(spectrogram.frames), plan, self.mean, self.scale)
            line = interpolated(spectrogram, plan, self.mean, self.scale)
            self.sums_bin_mean += clip_errors(average, targets, plan).tolist()
            self.sums_interpolation += clip_errors(line, targets, plan).tolist()
            known = visible_levels(spectrogram, plan, self.mean, self.scale) if standardised else None
            self.levels.append(known)

    @torch.no_grad()
    def _baseline(self) -> dict[str, float]:
        """Return the losses of the per-bin-mean predictor, which no model changes."""
        sums = dict.fromkeys(self.counts, 0.0)
        for spectrogram, masks in zip(self.spectrograms, self.plans, strict=True):
            terms = self.step.objective.per_bin_mean_terms(spectrogram, masks, self.mean, self.scale)
            for name in self.counts:
                sums[name] += float(terms[name].sum)
        return {name: value / max(1, self.counts[name]) for name, value in sums.items()}

    @torch.no_grad()
    def __call__(self, steps_done: int, *, draw: bool = True) -> tuple[Validation, list[Reconstruction]]:
        """Return losses and errors and, with `draw`, reconstructions of the model as it is now."""
        model, objective = self.step.model, self.step.objective
        sums = dict.fromkeys(self.counts, 0.0)
        errors: list[float] = []
        predictions: list[Tensor] = []
        was_training = model.training
        model.eval()
        for spectrogram, masks, levels in zip(self.spectrograms, self.plans, self.levels, strict=True):
            with self.step.precision.autocast(self.step.world.device):
                output = model(spectrogram, masks, self.mean, self.scale, None)
            terms = objective.terms(output, spectrogram, masks, self.mean, self.scale)
            for name in self.counts:
                sums[name] += float(terms[name].sum)
            if output.pred_recon is None:
                continue
            predicted = output.pred_recon.float()
            predicted = predicted if levels is None else destandardised(predicted, *levels)
            targets = masked_patches(spectrogram.frames, masks[-1], self.mean, self.scale)
            errors += clip_errors(predicted, targets, masks[-1]).tolist()
            if draw:
                predictions.append(predicted.cpu())
        model.train(was_training)
        weights = objective.weights
        parts = {name: value / max(1, self.counts[name]) for name, value in sums.items()}
        values = max(1, sum(self.values))
        validation = Validation(
            step=steps_done,
            loss=sum(weights[name] * value for name, value in parts.items()),
            parts=parts,
            baseline=sum(weights[name] * value for name, value in self.baseline_parts.items()),
            baseline_parts=self.baseline_parts,
            error=sum(errors) / values if errors else None,
            error_bin_mean=sum(self.sums_bin_mean) / values if errors else None,
            error_interpolation=sum(self.sums_interpolation) / values if errors else None,
        )
        return validation, self._reconstructions(predictions, errors) if predictions else []

    @torch.no_grad()
    def encoder_spread(self) -> float | None:
        """Return how far apart the encoder's outputs are, for the visible tokens of the first batch of held-out clips:
        their variance over their mean square, in [0, 1]; None for a single token.

        It is 0 for an encoder that has collapsed: one that says the same of every token, whatever it reads. Neither
        the loss nor its gradients need to show that, since the decoder goes on learning without it.
        """
        model = self.step.model
        was_training = model.training
        model.eval()
        last = model.encoder.config.layers
        with self.step.precision.autocast(self.step.world.device):
            encoded = model.encoded(self.spectrograms[0], self.plans[0][-1], self.mean, self.scale, {last})
        model.train(was_training)
        tokens = encoded[last].tokens.double()
        if len(tokens) < 2:
            return None
        square = float(tokens.square().mean())
        return float((tokens - tokens.mean(0)).square().mean()) / square if square else 0.0

    def plans_of_training(self, steps_done: int) -> Iterator[MaskPlan]:
        """Yield a mask of each held-out clip, as the next step of training would draw it."""
        step = self.step
        key = StepKey.make(step.recipe.seed, KEY_STEP, step.world.device)
        for spectrogram in self.spectrograms:
            view = step.view(steps_done, spectrogram, self.mean, self.scale)
            yield step.recipe.masking.plan(view.layout, key, 0, view)

    def _reconstructions(self, predictions: list[Tensor], errors: list[float]) -> list[Reconstruction]:
        """Return the clips to draw, the one with the median error first and the others from short to long ones.

        predictions: the normalised masked patches of each batch. errors: summed over each clip.
        """
        middle = median([e / n if n else math.nan for e, n in zip(errors, self.values, strict=True)])
        others = [clip for clip in self.by_length if clip != middle]
        wanted = [*([] if middle is None else [middle]), *others][: self.pictures]
        batches = [i for i, s in enumerate(self.spectrograms) for _ in s.lengths]
        grids = {i: mask_grids(self.plans[i][-1]) for i in {batches[clip] for clip in wanted}}
        mean, scale = self.mean.float().cpu().numpy(), self.scale.float().cpu().numpy()  # (1,) or (F,)
        mel = self.step.recipe.frontend.mel
        out = []
        for clip in wanted:
            batch = batches[clip]
            spectrogram, plan = self.spectrograms[batch], self.plans[batch][-1]
            index, grid = clip - batches.index(batch), plan.layout.grid
            truth = spectrogram.clip(index).float().cpu().numpy()
            patches = predictions[batch].split(list(plan.n_masked))[index].numpy()
            canvas, masked = assemble(
                grids[batch][index], patches, grid.patch_freq, grid.patch_time, grid.order
            )
            # a last column may reach past the clip, and a dropped one leaves frames that no token covers
            frames = min(len(truth), len(canvas))
            truth, canvas, masked = truth[:frames], canvas[:frames], masked[:frames]
            number, values = int(spectrogram.clip_ids[index]), max(1, self.values[clip])
            out.append(
                Reconstruction(
                    name=self.names[number] if number < len(self.names) else str(number),
                    input=truth * mel.divisor - mel.offset,
                    prediction=(canvas / scale + mean) * mel.divisor - mel.offset,
                    masked=masked,
                    error=errors[clip] / values,
                    error_bin_mean=self.sums_bin_mean[clip] / values,
                    error_interpolation=self.sums_interpolation[clip] / values,
                    median_of=len(errors) if clip == middle else None,
                )
            )
        return out


def median(errors: list[float]) -> int | None:
    """Return the index of the median, of the lower one of two; None where all are NaN, which counts for nothing."""
    ranked = sorted((i for i, e in enumerate(errors) if not math.isnan(e)), key=lambda i: errors[i])
    return ranked[(len(ranked) - 1) // 2] if ranked else None


def spread(lengths: list[int], wanted: int) -> list[int]:
    """Return up to `wanted` indices, ascending, whose lengths are spread evenly over the ranking of all lengths."""
    ranked = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    wanted = min(wanted, len(ranked))
    return sorted(ranked[(2 * k + 1) * len(ranked) // (2 * wanted)] for k in range(wanted))


def assemble(
    tokens: NDArray[np.bool_], patches: NDArray[np.float32], patch_freq: int, patch_time: int, order: str
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the (frames, bins) canvas of a clip with its masked patches filled in, and which cells those are.

    tokens: (freq, columns) bool, True where masked. patches: (M, patch_freq * patch_time), masked tokens in token
    order.
    """
    freq, columns = tokens.shape
    cells = np.zeros((freq, columns, patch_freq, patch_time), dtype=np.float32)
    if order == "time":
        by_token = cells.transpose(1, 0, 3, 2)
        by_token[tokens.T] = patches.reshape(-1, patch_time, patch_freq)
    else:
        cells[tokens] = patches.reshape(-1, patch_freq, patch_time)
    canvas = cells.transpose(1, 3, 0, 2).reshape(columns * patch_time, freq * patch_freq)
    masked = tokens.repeat(patch_freq, axis=0).repeat(patch_time, axis=1).T
    return canvas, masked
