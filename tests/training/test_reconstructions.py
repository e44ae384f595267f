# SPDX-License-Identifier: Apache-2.0
"""The errors of held-out clips and what is drawn of them: cell by cell, with the clip of the median error among them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from steps import new_step
from torch import Tensor

from masktrain.frontend.frontend import Frontend
from masktrain.models.pretrainer import Prediction
from masktrain.objectives.patches import (
    destandardised,
    interpolated,
    masked_patches,
    seen_cells,
    standardised,
    visible_levels,
)
from masktrain.recipes import find
from masktrain.training.recipe import Recipe
from masktrain.training.step import Step
from masktrain.training.validation import Validator, median
from masktrain.types import AudioBatch

LOUDER = (5.0, 1.0, 2.0, 4.0, 3.0)


class Known(torch.nn.Module):
    """Predicts what the test knows, under the last of its masks."""

    def __init__(self, step: Step, kind: str) -> None:
        super().__init__()
        self.config, self.input_norm, self.kind = step.model.config, step.model.input_norm, kind
        self.norm_pix_loss = getattr(step.objective, "norm_pix_loss", False)

    def forward(self, spectrogram: Any, plans: Any, mean: Any, scale: Any, key: Any) -> Prediction:
        plan = plans[-1]
        patches = masked_patches(spectrogram.frames, plan, mean, scale)
        if self.kind == "interpolation":
            patches = interpolated(spectrogram, plan, mean, scale)
        elif self.kind == "0":
            patches = torch.zeros_like(patches)
        elif self.kind == "louder by clip":
            add = torch.tensor([LOUDER[i] for i in spectrogram.clip_ids.tolist()])
            patches = patches + torch.repeat_interleave(add, torch.tensor(plan.n_masked))[:, None]
        predicted = standardised(patches) if self.norm_pix_loss else patches
        matched = masked_patches(spectrogram.frames, plans[0], mean, scale)
        return Prediction(predicted, predicted, matched)


def audio_of(lengths: tuple[int, ...], rate: int, first: int = 0) -> AudioBatch:
    ids = torch.arange(first, first + len(lengths))
    samples = 0.1 * torch.randn(sum(lengths), generator=torch.Generator().manual_seed(first))
    return AudioBatch(samples, lengths, (rate,) * len(lengths), ids, torch.zeros_like(ids))


def maskspec(norm_pix_loss: bool) -> Recipe:
    recipe = find("maskspec", "tiny")
    assert recipe.frontend.mel.divisor == 5 and recipe.input_norm.kind == "per_bin"
    return replace(recipe, objective=replace(recipe.objective, norm_pix_loss=norm_pix_loss))


def test_a_perfect_prediction_is_drawn_as_the_input() -> None:
    """Statistics and the affine of the front end are undone."""
    recipe = maskspec(norm_pix_loss=False)
    step, audio = new_step(recipe), audio_of((20_000, 40_000), 32_000)
    step.model = Known(step, "targets")  # type: ignore[assignment]
    validation, drawn = Validator(step, [audio], ["a.wav", "b.wav"], 3)(0)
    assert validation.loss == pytest.approx(0, abs=1e-6) and validation.error == 0
    plain = Frontend(recipe.frontend)(audio)
    assert sorted(picture.name for picture in drawn) == ["a.wav", "b.wav"]
    for picture in drawn:
        clip = ("a.wav", "b.wav").index(picture.name)
        frames = 16 * (plain.lengths[clip] // 16)
        natural = 5 * plain.clip(clip).numpy()[:frames] - 4.5
        np.testing.assert_allclose(picture.input, natural, atol=1e-5)
        np.testing.assert_allclose(picture.composed(), natural, atol=1e-4)
        assert picture.masked.mean() > 0.5 and picture.error == 0 < picture.error_interpolation


def test_level_and_contrast_are_those_that_the_visible_patches_tell() -> None:
    recipe = maskspec(norm_pix_loss=True)
    step, audio = new_step(recipe), audio_of((20_000, 40_000), 32_000)
    step.model = Known(step, "interpolation")  # type: ignore[assignment]
    validator = Validator(step, [audio], ["a.wav", "b.wav"], 2)
    for picture in validator(0)[1]:
        error = (picture.prediction - picture.input) / 5 * validator.scale.numpy()  # of a cell, normalised
        assert np.square(error[picture.masked]).mean() == pytest.approx(picture.error, rel=1e-4)
    # the true patches, told without level and contrast: what is left is what interpolation does not know of both
    step.model = Known(step, "targets")  # type: ignore[assignment]
    spectrogram, plan = validator.spectrograms[0], validator.plans[0][-1]
    inputs = (spectrogram, plan, validator.mean, validator.scale)
    targets = masked_patches(spectrogram.frames, plan, validator.mean, validator.scale)
    restored = destandardised(standardised(targets), *visible_levels(*inputs))
    error = validator(1, draw=False)[0].error
    assert error == pytest.approx(float((restored - targets).square().mean()), rel=1e-5)
    assert error is not None and error > 0


@pytest.mark.parametrize("name", ["maskspec", "mae_ast_patch", "ssast_patch"])
def test_errors_are_means_over_the_masked_cells_of_all_clips(name: str) -> None:
    """Against loops over cells, of models with one mask and with two; the last of the masks counts."""
    recipe = maskspec(norm_pix_loss=False) if name == "maskspec" else find(name, "tiny")
    recipe = replace(recipe, tokens=replace(recipe.tokens, partial="drop"))
    step = new_step(recipe)
    rate = recipe.frontend.sample_rate
    audio = [audio_of((rate, 2 * rate), rate), audio_of((rate // 2, rate), rate, first=2)]
    step.model = Known(step, "0")  # type: ignore[assignment]
    validator = Validator(step, audio, ["x"] * 4, 0)
    assert all(len(masks) == (2 if name == "ssast_patch" else 1) for masks in validator.plans)
    validation, drawn = validator(0)
    sums, cells = np.zeros(3), 0
    average = torch.cat([s.frames for s in validator.spectrograms]).double().mean(0)
    norm_mean = validator.mean.expand(len(average))
    for spectrogram, masks in zip(validator.spectrograms, validator.plans, strict=True):
        frames = spectrogram.frames.double()
        seen = seen_cells(spectrogram, masks[-1])
        start = 0
        for length in spectrogram.lengths:
            used = length // recipe.tokens.patch_time * recipe.tokens.patch_time
            masked = ~seen[start : start + used].numpy()
            for column, (bin_mean, line) in enumerate(
                zip(average, interpolation_of(frames[start:], seen[start:], used), strict=True)
            ):
                truth = frames[start : start + used, column].numpy()
                scale = float(validator.scale.expand(frames.shape[1])[column])
                wanted = masked[:, column]
                sums[0] += scale**2 * np.square(truth - float(bin_mean))[wanted].sum()
                sums[2] += scale**2 * np.square(truth - float(norm_mean[column]))[wanted].sum()
                if line is not None:
                    sums[1] += scale**2 * np.square(truth - line)[wanted].sum()
            cells += masked.sum()
            start += length
    assert validation.error_bin_mean == pytest.approx(sums[0] / cells, rel=1e-4)
    assert validation.error == pytest.approx(sums[2] / cells, rel=1e-4) and drawn == []
    # bins that no frame of a clip shows have other values, tested with `interpolated` itself
    assert validation.error_interpolation is not None
    assert validation.error_interpolation >= sums[1] / cells * (1 - 1e-4)


def interpolation_of(frames: Tensor, seen: Tensor, used: int) -> list[np.ndarray | None]:
    """Each bin of a clip's first `used` frames by numpy's interpolation, None for one without a visible frame."""
    out: list[np.ndarray | None] = []
    for column in range(frames.shape[1]):
        shown = np.flatnonzero(seen[:used, column].numpy())
        known = frames[:used, column].numpy()
        out.append(np.interp(np.arange(used), shown, known[shown]) if len(shown) else None)
    return out


def test_the_clip_with_the_median_error_is_drawn_first_and_said_to_be() -> None:
    step = new_step(maskspec(norm_pix_loss=False))
    step.model = Known(step, "louder by clip")  # type: ignore[assignment]
    audio = [audio_of((30_000, 50_000), 32_000), audio_of((20_000, 40_000, 60_000), 32_000, first=2)]
    validator = Validator(step, audio, [f"{clip}.wav" for clip in range(5)], 3)
    drawn = validator(0)[1]
    # the third of five errors is that of clip 4, the longest; the others are a short and a long one
    assert [picture.name for picture in drawn] == ["4.wav", "0.wav", "1.wav"]
    assert [picture.median_of for picture in drawn] == [5, None, None]
    for picture in drawn:
        assert picture.error == pytest.approx(LOUDER[int(picture.name[0])] ** 2, rel=1e-4)
    assert [p.name for p in Validator(step, audio, [""] * 5, 1)(0)[1]] == [""]
    assert Validator(step, audio, [""] * 5, 0)(0)[1] == [] == validator(0, draw=False)[1]


def test_the_median_is_neither_the_best_nor_a_clip_without_masks() -> None:
    assert median([3.0, 1.0, 2.0]) == 2
    assert median([3.0, 1.0, 2.0, 4.0]) == 2
    assert median([math.nan, 5.0, math.nan]) == 1
    assert median([math.nan]) is None and median([]) is None


def test_destandardised_undoes_standardised() -> None:
    patches = 3 + 2 * torch.randn(50, 256, dtype=torch.float64)
    variance, average = torch.var_mean(patches, dim=1, keepdim=True)
    again = destandardised(standardised(patches), average, variance)
    torch.testing.assert_close(again, patches, rtol=0, atol=1e-12)
