# SPDX-License-Identifier: Apache-2.0
"""Pictures of masking strategies: what each would mask in a clip, at several hint ratios, and the scores behind it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.data.crop import crop_length
from masktrain.data.decode import Crop, probe, read_crop, too_short
from masktrain.errors import DataError
from masktrain.frontend.frontend import Frontend
from masktrain.frontend.length import fill_with_silence, pad_to
from masktrain.kernels.log_mel.filters import centre_frequencies
from masktrain.masking.dispersion import DispersionMasking
from masktrain.masking.registry import Strategy
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.masking.view import View
from masktrain.models import registry
from masktrain.models.input_norm import InputNorm
from masktrain.models.pretrainer import Pretrainer
from masktrain.training.checkpoint import load_model
from masktrain.training.drawing import INK, MASKED, colour_map, new_figure, shortened, style, swatch
from masktrain.training.pictures import DECIBEL, MelAxes, colour_range, mask_grids
from masktrain.training.recipe import Recipe
from masktrain.training.step_view import StepView
from masktrain.training.weights import find_checkpoint
from masktrain.types import AudioBatch, Spectrogram, StepKey, TokenLayout

if TYPE_CHECKING:
    from masktrain.training.drawing import Axes, Figure

Array = NDArray[Any]

RATE_PLANS = 200
"""Masks that the share of a token is counted over, for a strategy without scores."""
READING = (
    "Left: the score of each token, bright ones are masked first; or how often it is masked.\n"
    "Right: what the encoder sees. At hint ratio 0 the mask is the strategy's own, at 1 it is random."
)
PANEL = (3.4, 1.5)
"""Width and height of one spectrogram in inches."""


# --- what is drawn ---


@dataclass(frozen=True)
class Encoder:
    """What supplies features and input statistics. recipe: its own. model: in evaluation mode. trained: whether its
    weights are from a checkpoint. name: for the picture."""

    recipe: Recipe
    model: Pretrainer
    trained: bool
    name: str


@dataclass(frozen=True)
class ClipView:
    """One clip as strategies see it. log_mel: (T, F) natural log of the mel power. name, seconds, whole_seconds: of the
    part that is shown, and of the file."""

    name: str
    seconds: float
    whole_seconds: float
    log_mel: Array
    layout: TokenLayout
    view: View


@dataclass(frozen=True)
class Mask:
    """One mask. title: which. masked: (freq, columns) bool."""

    title: str
    masked: NDArray[np.bool_]


@dataclass(frozen=True)
class StrategyRow:
    """One strategy on one clip. what: the values stand for. values: (freq, columns), the score of each token or, where
    is_share, how often it is masked. masks: from left to right."""

    name: str
    what: str
    values: Array
    is_share: bool
    masks: tuple[Mask, ...]


def load_encoder(path: Path) -> Encoder:
    """Return the encoder of a run or of one checkpoint, on the CPU. Raises CheckpointError."""
    saved, recipe = find_checkpoint(path)
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    load_model(model, saved.tensors.get("model", {}))
    return Encoder(recipe, model.eval(), True, f"{recipe.name} ({recipe.size}), step {saved.step}")


def untrained_encoder(recipe: Recipe) -> Encoder:
    """Return an encoder of the recipe with fresh weights, which follow from the recipe's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    return Encoder(recipe, model.eval(), False, f"{recipe.name} ({recipe.size}), UNTRAINED")


def read_clip(path: Path, recipe: Recipe, encoder: Encoder | None, number: int = 0) -> ClipView:
    """Return the start of a file, as long as the recipe's clips are, under its length policy.

    encoder: whose features and input statistics strategies see. Without statistics of training data, those of the clip
    itself are taken. number: the clip's id, which its masks depend on. Raises DataError, naming the file.
    """
    try:
        audio, whole = _audio(path, recipe, number)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    seconds = audio.lengths[0] / audio.sample_rates[0]
    if recipe.data.padding == "silence":
        assert recipe.data.clip_seconds is not None
        audio = fill_with_silence(audio, recipe.data.clip_seconds)
    spectrogram = Frontend(recipe.frontend)(audio)
    if recipe.data.padding == "reference":
        assert recipe.data.target_length is not None
        spectrogram = pad_to(spectrogram, recipe.data.target_length)
    mean, scale = _normalisation(recipe, encoder, spectrogram)
    layout = recipe.grid.layout(spectrogram)
    if encoder is None:
        view = View(1.0, spectrogram, mean, scale)
    else:
        encoder.model.check_columns(layout.columns[0])
        view = StepView(
            progress=1.0,
            spectrogram=spectrogram,
            mean=mean,
            scale=scale,
            layout=layout,
            model=encoder.model,
            autocast=nullcontext,
        )
    mel = recipe.frontend.mel
    log_mel = spectrogram.frames.float().numpy() * mel.divisor - mel.offset
    return ClipView(os.path.basename(path), seconds, whole, log_mel, layout, view)


def _audio(path: Path, recipe: Recipe, number: int) -> tuple[AudioBatch, float]:
    """Return the part that is shown and the seconds of the whole file."""
    info, token = probe(path), recipe.tokens
    # The fewest frames that give a token.
    frames = token.patch_time if token.partial == "drop" else (token.patch_time + 1) // 2
    least = recipe.frontend.min_samples(info.sample_rate, frames)
    length = crop_length(info.num_samples, info.sample_rate, recipe.data.clip_seconds)
    if length < least:
        raise DataError(too_short(length, least))
    decoded = read_crop(Crop(str(path), 0, length, info.num_samples, info.sample_rate, least))
    samples = torch.from_numpy(decoded.samples)
    batch = AudioBatch(
        samples, (len(samples),), (info.sample_rate,), torch.tensor([number]), torch.tensor([0])
    )
    return batch, info.num_samples / info.sample_rate


def _normalisation(
    recipe: Recipe, encoder: Encoder | None, spectrogram: Spectrogram
) -> tuple[Tensor, Tensor]:
    if encoder is not None and encoder.trained:
        return encoder.model.input_norm.affine(None)
    norm, frames = InputNorm(recipe.input_norm, recipe.frontend.n_mels), spectrogram.frames
    if recipe.input_norm.kind == "per_bin":
        norm.set_bins(frames.mean(0), frames.std(0, correction=0))
    return norm.affine(norm.statistics(frames) if norm.uses_batch else None)


# --- masks ---


@torch.no_grad()
def strategy_row(masking: Strategy, clip: ClipView, hints: Sequence[float], seed: int) -> StrategyRow:
    """Return the masks of a strategy: one for each hint ratio where it has hints, else as many draws.

    seed: of the masks, in [0, 2^48); the draws are steps 0, 1, ... of a run with this seed.
    """
    layout = clip.layout
    if not isinstance(masking, DispersionMasking | SelfGuidedMasking):
        keys = [StepKey.make(seed, step, "cpu") for step in range(RATE_PLANS)]
        grids = [mask_grids(masking.plan(layout, key, 0, clip.view))[0] for key in keys]
        drawn = tuple(Mask(f"draw {i + 1}", grid) for i, grid in enumerate(grids[: len(hints)]))
        share = np.mean(grids, axis=0)
        return StrategyRow(masking.name, f"share masked in {RATE_PLANS} draws", share, True, drawn)
    key = StepKey.make(seed, 0, "cpu")
    masks = []
    for ratio in hints:
        fixed = replace(masking, hint=replace(masking.hint, abs_hint_ratio=ratio))
        masks.append(Mask(f"hint ratio {ratio:g}", mask_grids(fixed.plan(layout, key, 0, clip.view))[0]))
    scores = masking.scores(layout, clip.view).float().numpy()
    by_time = layout.grid.order == "time"
    values = scores.reshape(layout.columns[0], -1).T if by_time else scores.reshape(-1, layout.columns[0])
    if isinstance(masking, DispersionMasking):
        what = "mean absolute deviation" if masking.weight == "mad" else "variance"
    else:
        what = "similarity to foreground" if masking.rule == "paper" else "distance from both sides"
    return StrategyRow(masking.name, what, values, False, tuple(masks))


# --- the figure ---


def masks_figure(
    clips: Sequence[tuple[ClipView, Sequence[StrategyRow]]], recipe: Recipe, hints: int, title: str, note: str
) -> Figure:
    """Return the spectrogram of each clip, and below it a row for each strategy: values, then masks.

    hints: masks of a row. note: for the foot of the figure.
    """
    if not clips or not all(rows for _, rows in clips):
        raise ValueError("masks_figure: no clip, or a clip without strategies")
    axes = MelAxes(centre_frequencies(recipe.frontend.mel).numpy(), 1 / recipe.frontend.frame_rate)
    height = sum(1 + len(rows) for _, rows in clips)
    with style():
        figure = new_figure(PANEL[0] * (1 + max(hints, 1)) + 1.2, 0.9 + (PANEL[1] + 0.42) * height, title)
        grid = figure.add_gridspec(height, 1 + hints)
        place = 0
        for clip, rows in clips:
            _draw_clip(figure, grid, place, clip, rows, axes, recipe)
            place += 1 + len(rows)
        figure.legend(handles=[swatch(MASKED, "masked token")], loc="outside upper right")
        if note:
            figure.supxlabel(note, x=0.008, ha="left", fontsize=8, color=INK)
    return figure


def _draw_clip(
    figure: Figure,
    grid: Any,
    place: int,
    clip: ClipView,
    rows: Sequence[StrategyRow],
    axes: MelAxes,
    recipe: Recipe,
) -> None:
    tokens = recipe.grid
    # A last column may reach past the clip, and a dropped one leaves frames that no token covers.
    frames = min(len(clip.log_mel), clip.layout.columns[0] * tokens.patch_time)
    power = clip.log_mel[:frames].astype(np.float64).T * DECIBEL
    low, high = colour_range(power)
    seconds, bins = frames * axes.hop_s, float(power.shape[0])
    spectrogram: dict[str, Any] = {
        "extent": (0.0, seconds, 0.0, bins),
        "cmap": colour_map("magma", MASKED),
        "vmin": low,
        "vmax": high,
    }
    # Values of tokens end where their column ends.
    reach = clip.layout.columns[0] * tokens.patch_time * axes.hop_s

    panel = figure.add_subplot(grid[place, 0])
    image = _image(panel, power, spectrogram, axes, seconds)
    panel.set_title(f"log-mel of {shortened(clip.name, 40)}", fontweight="bold", parse_math=False)
    panel.set_ylabel("frequency (Hz)")
    _bar(figure, panel, image, "dB")
    cut = "" if clip.whole_seconds <= clip.seconds else f" (the first of {clip.whole_seconds:.3g} s)"
    freq, columns = tokens.freq, clip.layout.columns[0]
    text = (
        f"{clip.seconds:.3g} s{cut}: {freq} x {columns} = {freq * columns} tokens\n"
        f"of {tokens.patch_freq} mel bins x {tokens.patch_time} frames ({tokens.patch_time * axes.hop_s * 1000:.3g} ms)"
    )
    side = figure.add_subplot(grid[place, 1:])
    side.set_axis_off()
    side.text(0.0, 0.95, f"{text}\n\n{READING}", va="top", fontsize=9, color=INK, parse_math=False)

    for number, row in enumerate(rows, start=place + 1):
        last = number == place + len(rows)
        panel = figure.add_subplot(grid[number, 0])
        finite = row.values[np.isfinite(row.values)]
        bottom, top = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        shown: dict[str, Any] = {
            "extent": (0.0, reach, 0.0, bins),
            "cmap": colour_map("viridis", MASKED),
            "vmin": 0.0 if row.is_share else bottom,
            "vmax": 1.0 if row.is_share else max(top, bottom + 1e-6),
        }
        image = _image(panel, row.values, shown, axes, seconds)
        panel.set_title(f"{row.name}: {row.what}", fontweight="bold", parse_math=False)
        panel.set_ylabel("frequency (Hz)")
        _bar(figure, panel, image, "share" if row.is_share else "score")
        panels = [panel]
        for column, mask in enumerate(row.masks, start=1):
            panel = figure.add_subplot(grid[number, column])
            cells = mask.masked.repeat(tokens.patch_freq, axis=0).repeat(tokens.patch_time, axis=1)
            _image(panel, np.ma.masked_array(power, cells[:, :frames]), spectrogram, axes, seconds)
            count, total = int(mask.masked.sum()), mask.masked.size
            panel.set_title(f"{mask.title}: {count} of {total} masked ({100 * count / total:.0f} %)")
            panels.append(panel)
        for panel in panels if last else ():
            panel.set_xlabel("time (s)")


def _image(panel: Axes, cells: Array, how: dict[str, Any], axes: MelAxes, seconds: float) -> Any:
    image = panel.imshow(cells, origin="lower", aspect="auto", interpolation="nearest", **how)
    panel.set_yticks(*axes.ticks(PANEL[1]))
    panel.set_xlim(0.0, seconds)
    return image


def _bar(figure: Figure, panel: Axes, image: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=panel, pad=0.015, fraction=0.05)
    bar.set_label(label)
    bar.outline.set_visible(False)
