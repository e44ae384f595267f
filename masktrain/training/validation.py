# SPDX-License-Identifier: Apache-2.0
"""Held-out clips: their losses beside those of the per-bin-mean predictor, and their reconstructions.

The clips, their crops and their masks are the same at every evaluation, and their input statistics are those of the
held-out clips themselves, so that the start, the middle and the end of a run can be compared.
"""

from __future__ import annotations

import os
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.objectives import joint
from masktrain.training.pictures import Reconstruction, Validation, mask_grids
from masktrain.training.step import Step
from masktrain.types import AudioBatch, MaskPlan, Spectrogram, StepKey

# a step that no run reaches: keeps these masks apart from those of training
KEY_STEP = 0xFFFFFFFF


class Validator:
    """Evaluates the model of a step on held-out audio."""

    def __init__(self, step: Step, audio: list[AudioBatch], names: list[str], pictures: int) -> None:
        """names: the path of each clip id. pictures: how many clips are drawn, from short to long ones."""
        self.step = step
        self.names = [os.path.basename(name) for name in names]
        key = StepKey.make(step.recipe.seed, KEY_STEP, step.world.device)
        self.spectrograms = step.fit_lengths([step.spectrogram(a) for a in audio], key)
        self.plans = [step.recipe.masking.plan(step.grid.layout(s), key) for s in self.spectrograms]
        norm = step.model.input_norm
        sums = torch.stack([norm.statistics(s.frames) for s in self.spectrograms]).sum(0)
        self.mean, self.scale = norm.affine(sums if norm.uses_batch else None)
        self.drawn = spread([n for s in self.spectrograms for n in s.lengths], pictures)
        each = [joint.counts(plan, step.grid) for plan in self.plans]
        self.counts = {name: sum(counts[name] for counts in each) for name in each[0]}

    @torch.no_grad()
    def __call__(self, steps_done: int) -> tuple[Validation, list[Reconstruction]]:
        """Return losses and reconstructions of the model as it is now."""
        model, objective = self.step.model, self.step.recipe.objective
        sums = dict.fromkeys(self.counts, 0.0)
        trivial = dict.fromkeys(self.counts, 0.0)
        drawn: list[Reconstruction] = []
        first = 0
        was_training = model.training
        model.eval()
        for spectrogram, plan in zip(self.spectrograms, self.plans, strict=True):
            with self.step.precision.autocast(self.step.world.device):
                output = model(spectrogram, plan, self.mean, self.scale, None)
            terms = joint.terms(output, spectrogram, plan, self.mean, self.scale, objective)
            baseline = joint.per_bin_mean_terms(spectrogram, plan, self.mean, self.scale, objective)
            for name in self.counts:
                sums[name] += float(terms[name].sum)
                trivial[name] += float(baseline[name].sum)
            clips = range(first, first + len(spectrogram.lengths))
            first = clips.stop
            drawn += self._reconstructions(
                spectrogram, plan, output.pred_recon, [i - clips.start for i in self.drawn if i in clips]
            )
        model.train(was_training)
        weights = joint.weights(objective)
        parts = {name: value / max(1, self.counts[name]) for name, value in sums.items()}
        baseline_parts = {name: value / max(1, self.counts[name]) for name, value in trivial.items()}
        validation = Validation(
            step=steps_done,
            loss=sum(weights[name] * value for name, value in parts.items()),
            parts=parts,
            baseline=sum(weights[name] * value for name, value in baseline_parts.items()),
            baseline_parts=baseline_parts,
        )
        return validation, drawn

    def _reconstructions(
        self, spectrogram: Spectrogram, plan: MaskPlan, predicted: Tensor, wanted: list[int]
    ) -> list[Reconstruction]:
        """Undo patches and normalisation for the clips `wanted` of a batch."""
        if not wanted:
            return []
        grid = plan.layout.grid
        mean, scale = float(self.mean.mean()), float(self.scale.mean())
        values = predicted.float().cpu().numpy()
        starts = [0, *accumulate(plan.n_masked)]
        grids = mask_grids(plan)
        out = []
        for index in wanted:
            truth = spectrogram.clip(index).float().cpu().numpy()
            patches = values[starts[index] : starts[index + 1]]
            canvas, masked = assemble(grids[index], patches, grid.patch_freq, grid.patch_time, grid.order)
            # a last column may reach past the clip, and a dropped one leaves frames that no token covers
            frames = min(len(truth), len(canvas))
            truth, canvas, masked = truth[:frames], canvas[:frames], masked[:frames]
            error = (canvas - (truth - mean) * scale)[masked]
            clip = int(spectrogram.clip_ids[index])
            out.append(
                Reconstruction(
                    name=self.names[clip] if clip < len(self.names) else str(clip),
                    input=truth,
                    prediction=canvas / scale + mean,
                    masked=masked,
                    mse=float(np.square(error).mean()) if error.size else 0.0,
                )
            )
        return out


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
