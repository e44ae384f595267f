# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: reconstructions, how often each token was masked, loss and throughput curves.

Each `*new_figure` takes numbers and returns a matplotlib figure; `drawing.save` writes it as PNG.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from masktrain.training.drawing import (
    BASELINE,
    INK,
    INTERPOLATION,
    LOSS,
    MASKED,
    RATE,
    VALIDATION,
    WAIT,
    colour_map,
    new_figure,
    shortened,
    style,
    swatch,
)
from masktrain.types import MaskPlan

if TYPE_CHECKING:
    from masktrain.training.drawing import Axes, Figure

Array = NDArray[Any]

DECIBEL = 10 / math.log(10)  # of a natural-log power
RANGE_DB = 80.0  # below a clip's maximum, as far as the colours go
WIDE_COLUMNS = 300  # token columns up to which two clips stand side by side: three pixels a token are left
RARE = 0.2  # of the plans: what fewer had is not shown


@dataclass(frozen=True)
class MelAxes:
    """What the cells of a spectrogram mean. centres_hz: (F,) ascending centre frequency of each mel bin in
    Hz. hop_s: seconds from frame to frame."""

    centres_hz: Array
    hop_s: float

    def ticks(self, height: float = 1.6) -> tuple[list[float], list[str]]:
        """Return positions (in bins; bin k spans k to k + 1, its centre is k + 0.5) and labels of round Hz.

        height: of the axis in inches, which decides how many fit.
        """
        centres = np.asarray(self.centres_hz, dtype=np.float64)
        gap = 0.17 / height * len(centres)
        chosen: list[tuple[float, int]] = []
        # the powers of two above and below 1 kHz first: what stays when little fits
        for hz in (1000, 4000, 250, 8000, 500, 2000, 125, 16000, 60):
            if not centres[0] <= hz <= centres[-1]:
                continue
            position = float(np.interp(hz, centres, np.arange(len(centres)) + 0.5))
            if all(abs(position - other) >= gap for other, _ in chosen):
                chosen.append((position, hz))
        chosen.sort()
        return [position for position, _ in chosen], [str(hz) for _, hz in chosen]


# --- reconstruction ---


@dataclass(frozen=True)
class Reconstruction:
    """One clip. name: for the title. input, prediction: (T, F) natural-log mel power; only masked cells of
    the prediction are looked at. masked: (T, F) bool. error: mean squared error of the masked values, in the
    normalised units that the model is trained in; that of the per-bin mean and of interpolation in time beside it.
    median_of: of how many clips this one has the median error, None for any other."""

    name: str
    input: Array
    prediction: Array
    masked: Array
    error: float
    error_bin_mean: float
    error_interpolation: float
    median_of: int | None = None

    def composed(self) -> Array:
        """Return (T, F): the input where it was visible, the prediction where it was masked."""
        return np.where(self.masked, self.prediction, self.input)


def reconstruction_figure(
    clips: Sequence[Reconstruction], axes: MelAxes, title: str, patch_time: int = 1, note: str = ""
) -> Figure:
    """Return a figure with the input, what the model saw, and the reconstruction of each clip, one below the
    other.

    The three share one colour range, in dB: from the input's maximum down by `RANGE_DB` or to its minimum.
    patch_time: frames of a token, which decides how wide a clip has to be drawn. note: for the foot of the figure.
    """
    if not clips:
        raise ValueError("reconstruction_figure: no clips")
    for clip in clips:
        if clip.input.shape != clip.masked.shape or clip.input.shape != clip.prediction.shape:
            raise ValueError(f"reconstruction_figure: shapes of {clip.name!r} differ")
        if clip.input.shape[1] != len(axes.centres_hz):
            raise ValueError(
                f"reconstruction_figure: {clip.input.shape[1]} bins, {len(axes.centres_hz)} centres"
            )
    widest = max(math.ceil(len(clip.input) / patch_time) for clip in clips)
    columns = 2 if len(clips) > 1 and widest <= WIDE_COLUMNS else 1
    rows = math.ceil(len(clips) / columns)
    with style():
        figure = new_figure(13.0, 0.45 + 4.6 * rows, title)
        outer = figure.add_gridspec(rows, columns, hspace=0.06, wspace=0.05)
        for index, clip in enumerate(clips):
            _draw_clip(figure, outer[index // columns, index % columns], clip, axes)
        figure.legend(handles=[swatch(MASKED, "masked")], loc="outside upper right")
        if note:
            figure.supxlabel(note, x=0.008, ha="left", fontsize=8, color=INK)
    return figure


def _draw_clip(figure: Figure, place: Any, clip: Reconstruction, axes: MelAxes) -> None:
    truth = np.asarray(clip.input, dtype=np.float64) * DECIBEL
    composed = np.asarray(clip.composed(), dtype=np.float64) * DECIBEL
    low, high = colour_range(truth)
    grid = place.subgridspec(3, 1, hspace=0.0)
    panels = grid.subplots(sharex=True, sharey=True)
    seen = np.ma.masked_array(truth, clip.masked)
    extent = (0.0, len(truth) * axes.hop_s, 0.0, float(truth.shape[1]))
    colours = colour_map("magma", MASKED)
    image = None
    positions, labels = axes.ticks(1.25)
    for panel, cells, what in zip(
        panels, (truth, seen, composed), ("input", "visible", "reconstruction"), strict=True
    ):
        image = panel.imshow(
            cells.T,
            origin="lower",
            aspect="auto",
            extent=extent,
            interpolation="nearest",
            cmap=colours,
            vmin=low,
            vmax=high,
        )
        panel.set_yticks(positions, labels)
        panel.set_ylabel(f"{what}\nfrequency (Hz)")
    share = float(np.mean(clip.masked))
    seconds = len(truth) * axes.hop_s
    label = "" if clip.median_of is None else f"median error of {clip.median_of} clips: "
    panels[0].set_title(
        f"{label}{shortened(clip.name, 30)}   {seconds:.3g} s, {100 * share:.0f} % masked\n"
        f"squared error {clip.error:.3g} (interpolated in time {clip.error_interpolation:.3g}, per-bin mean "
        f"{clip.error_bin_mean:.3g})",
        parse_math=False,
    )
    panels[-1].set_xlabel("time (s)")
    assert image is not None
    bar = figure.colorbar(image, ax=list(panels), pad=0.012, fraction=0.04, aspect=40, extend="both")
    bar.set_label("log-mel power (dB)")
    bar.outline.set_visible(False)


def colour_range(decibels: Array) -> tuple[float, float]:
    """Return the lowest and highest dB that the colours tell apart, from the finite cells of a clip's
    input."""
    known = decibels[np.isfinite(decibels)]
    if known.size == 0:
        return -RANGE_DB, 0.0
    high = float(known.max())
    low = max(float(known.min()), high - RANGE_DB)
    return (low, high) if high - low > 1.0 else (high - 1.0, high)


# --- mask rate ---


def mask_grids(plan: MaskPlan) -> list[NDArray[np.bool_]]:
    """Return for each clip of a plan its tokens as a (freq, columns) grid, True where masked. Waits for the
    device."""
    layout = plan.layout
    masked = np.zeros(sum(layout.lengths), dtype=bool)
    masked[plan.masked.cpu().numpy()] = True
    grids, start = [], 0
    for columns, length in zip(layout.columns, layout.lengths, strict=True):
        tokens = masked[start : start + length]
        start += length
        time_major = layout.grid.order == "time"
        grids.append(tokens.reshape(columns, -1).T if time_major else tokens.reshape(-1, columns))
    return grids


@dataclass
class MaskRate:
    """How often each token was masked over many plans of clips of any length. masked, drawn: (freq, columns)
    counts; a token that a clip is too short for was not drawn."""

    freq: int
    masked: NDArray[np.int64] = field(init=False)
    drawn: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.masked = np.zeros((self.freq, 0), dtype=np.int64)
        self.drawn = np.zeros((self.freq, 0), dtype=np.int64)

    def add(self, grid: NDArray[np.bool_]) -> None:
        """Count one clip's (freq, columns) grid, as `mask_grids` gives it."""
        more = grid.shape[1] - self.masked.shape[1]
        if more > 0:
            self.masked = np.pad(self.masked, ((0, 0), (0, more)))
            self.drawn = np.pad(self.drawn, ((0, 0), (0, more)))
        self.masked[:, : grid.shape[1]] += grid
        self.drawn[:, : grid.shape[1]] += 1

    def rate(self) -> Array:
        """Return (freq, columns) shares in [0, 1], NaN for tokens never drawn."""
        share = np.full(self.masked.shape, np.nan)
        np.divide(self.masked, self.drawn, out=share, where=self.drawn > 0)
        return share


def mask_rate_figure(counts: MaskRate, axes: MelAxes, patch_time: int, patch_freq: int, title: str) -> Figure:
    """Return a heat map of how often each token was masked, its colours centred at the mean.

    The colours span at least what chance alone makes of independent draws (three standard deviations), so
    that an even map looks even. Tokens that under `RARE` of the plans had, at the end of the longest clips,
    are left grey: their share says little. patch_time, patch_freq: frames and bins of a token.
    """
    if not counts.drawn.any():
        raise ValueError("mask_rate_figure: no plan was counted")
    rate = counts.rate()
    plans = int(counts.drawn.max())
    often = counts.drawn >= RARE * plans
    rate[~often] = np.nan
    known, fewest = rate[often], int(counts.drawn[often].min())
    mean = float(counts.masked.sum() / counts.drawn.sum())
    chance = 3 * math.sqrt(mean * (1 - mean) / fewest)
    reach = max(chance, float(np.abs(known - mean).max()), 1e-3)
    with style():
        single = counts.freq == 1
        figure = new_figure(11.0, 4.2, title)
        panels = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.2) if single else (2.2, 1))
        panel, profile = panels
        columns = rate.shape[1]
        seconds = columns * patch_time * axes.hop_s
        image = panel.imshow(
            np.ma.masked_invalid(rate),
            origin="lower",
            aspect="auto",
            extent=(0.0, seconds, 0.0, float(counts.freq * patch_freq)),
            interpolation="nearest",
            cmap=colour_map("RdBu_r", MASKED),
            vmin=mean - reach,
            vmax=mean + reach,
        )
        panel.set_yticks(*axes.ticks(0.8 if single else 2.0))
        panel.set_ylabel("frequency (Hz)")
        panel.set_title(
            f"min {known.min():.3f}, mean {mean:.3f}, max {known.max():.3f} of {plans} plans; chance alone: "
            f"±{chance:.3f} (3 standard deviations)"
            + ("" if often.all() else f"; grey: under {RARE * plans:.0f} plans")
        )
        bar = figure.colorbar(image, ax=panel, pad=0.012, fraction=0.03)
        bar.set_label("share masked")
        bar.outline.set_visible(False)
        _draw_rate_over_time(profile, rate, seconds, mean)
    return figure


def _draw_rate_over_time(panel: Axes, rate: Array, seconds: float, mean: float) -> None:
    share = rate.mean(0)  # all tokens of a column were drawn equally often
    panel.stairs(share, np.linspace(0.0, seconds, len(share) + 1), color=LOSS, baseline=None)
    panel.axhline(mean, color=BASELINE, linewidth=1.0, linestyle=(0, (4, 3)))
    panel.set_ylim(0.0, 1.0)
    panel.set_ylabel("share masked")
    panel.set_xlabel("time (s)")
    panel.grid(True)


# --- curves ---


@dataclass(frozen=True)
class Validation:
    """Losses on held-out clips after `step` steps: of the model and of the predictor that knows only each mel
    bin's mean, in total and by part. error: mean squared error of the masked values of the normalised log-mel, that
    of the per-bin mean and that of linear interpolation in time; None for a model that reconstructs nothing."""

    step: int
    loss: float
    parts: Mapping[str, float]
    baseline: float
    baseline_parts: Mapping[str, float]
    error: float | None = None
    error_bin_mean: float | None = None
    error_interpolation: float | None = None


def loss_figure(rows: Sequence[Mapping[str, Any]], validations: Sequence[Validation], title: str) -> Figure:
    """Return the loss over the steps with the learning rate behind it, and each part below.

    rows: of metrics.jsonl. validations: points beside the curve and the level of the per-bin-mean predictor.
    """
    if not rows:
        raise ValueError("loss_figure: no rows")
    parts = [name for name in rows[0] if name.startswith("loss_") and name != "loss_max"]
    with style():
        figure = new_figure(9.0, 4.2 + (2.2 if parts else 0.0), title)
        grid = figure.add_gridspec(
            2 if parts else 1, max(1, len(parts)), height_ratios=(2, 1) if parts else (1,)
        )
        panel = figure.add_subplot(grid[0, :])
        _draw_loss(
            panel,
            rows,
            "loss",
            [(v.step, v.loss) for v in validations],
            validations[-1].baseline if validations else None,
        )
        panel.set_ylabel("loss")
        _draw_learning_rate(panel, rows)
        for index, name in enumerate(parts):
            short = name.removeprefix("loss_")
            below = figure.add_subplot(grid[1, index], sharex=panel)
            points = [(v.step, v.parts[short]) for v in validations if short in v.parts]
            baseline = validations[-1].baseline_parts.get(short) if validations else None
            _draw_loss(below, rows, name, points, baseline)
            below.set_title(short, parse_math=False)
            below.set_xlabel("step")
        if not parts:
            panel.set_xlabel("step")
    return figure


def _draw_loss(
    panel: Axes,
    rows: Sequence[Mapping[str, Any]],
    name: str,
    points: Sequence[tuple[int, float | None]],
    baseline: float | None,
) -> None:
    steps, values = series(rows, name)
    smooth = smoothed(values)
    points = [(step, value) for step, value in points if _is_number(value)]
    marker = "." if len(steps) < 12 else "None"
    panel.plot(steps, values, color=LOSS, alpha=0.3, linewidth=1.0)
    panel.plot(steps, smooth, marker=marker, color=LOSS, label="training")
    if points:
        panel.plot(
            *zip(*points, strict=True), "o", color=VALIDATION, markersize=5, label="held-out clips", zorder=4
        )
    if _is_number(baseline):
        panel.axhline(
            baseline, color=BASELINE, linewidth=1.2, linestyle=(0, (4, 3)), label="per-bin mean as prediction"
        )
    shown = np.array([v for v in (*values, *(p for _, p in points), baseline) if _is_number(v)])
    # a curve that falls by more than a decade is read on a logarithmic axis
    if shown.size and shown.min() > 0 and shown.max() > 12 * shown.min():
        panel.set_yscale("log")
    panel.grid(True)


def error_figure(runs: Mapping[str, Sequence[Validation]], title: str) -> Figure:
    """Return the error of held-out clips over the steps, a panel for each run, as a share of the per-bin mean's.

    runs: the evaluations of each run by its name, of models that reconstruct. The share makes runs comparable whose
    inputs are normalised differently: at 1 a model knows no more than the mean of each mel bin, and below the dashed
    line more than interpolation in time between what is visible.
    """
    if not runs or not all(runs.values()):
        raise ValueError("error_figure: no evaluations")
    columns = min(4, len(runs))
    rows = math.ceil(len(runs) / columns)
    with style():
        figure = new_figure(max(6.0, 3.1 * columns), 0.7 + 2.7 * rows, title)
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
        for panel in panels.flat[len(runs) :]:
            panel.set_visible(False)
        for panel, (name, evaluations) in zip(panels.flat, runs.items(), strict=False):
            _draw_error(panel, name, evaluations)
        for row in panels:
            row[0].set_ylabel("error / error of per-bin mean")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def _draw_error(panel: Axes, name: str, evaluations: Sequence[Validation]) -> None:
    known = [v for v in evaluations if _is_number(v.error) and v.error_bin_mean and v.error_interpolation]
    panel.axhline(1.0, color=BASELINE, linewidth=1.2, label="per-bin mean")
    if known:
        last = known[-1]
        assert last.error is not None and last.error_bin_mean and last.error_interpolation
        panel.axhline(
            last.error_interpolation / last.error_bin_mean,
            color=INTERPOLATION,
            linewidth=1.4,
            linestyle=(0, (4, 3)),
            label="interpolated in time",
        )
        shares = [v.error / v.error_bin_mean for v in known if v.error is not None and v.error_bin_mean]
        panel.plot([v.step for v in known], shares, "o-", color=VALIDATION, markersize=3, label="model")
        name = (
            f"{name}\n{last.error / last.error_bin_mean:.2f} x per-bin mean, "
            f"{last.error / last.error_interpolation:.2f} x interpolated"
        )
    panel.set_title(name, parse_math=False)
    panel.set_ylim(0.0, 1.3)  # what a model starts from may lie far above
    panel.set_xlabel("step")
    panel.grid(True)


def _is_number(value: float | None) -> TypeGuard[float]:
    """A loss that was not finite is null in its file."""
    return value is not None and math.isfinite(value)


def _draw_learning_rate(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    steps, rates = series(rows, "lr")
    right = panel.twinx()
    right.plot(steps, rates, color=RATE, linewidth=1.1, linestyle=(0, (1, 1.5)), label="learning rate")
    right.set_ylim(bottom=0.0)
    right.set_ylabel("learning rate")
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    # the loss is drawn over it
    panel.set_zorder(right.get_zorder() + 1)
    panel.patch.set_visible(False)
    lines = [*panel.get_lines()[1:], *right.get_lines()]
    labels = [str(line.get_label()) for line in lines]
    panel.legend(lines, labels, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4, borderaxespad=0.2)


def throughput_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return clips per second over the steps, and below it the share of the time that was spent waiting for
    data."""
    if not rows:
        raise ValueError("throughput_figure: no rows")
    with style():
        figure = new_figure(9.0, 4.6, title)
        panel, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        steps, clips = series(rows, "clips_per_s")
        panel.plot(steps, clips, color=LOSS, alpha=0.3, linewidth=1.0)
        panel.plot(steps, smoothed(clips), color=LOSS)
        known = clips[np.isfinite(clips)]
        if known.size:
            median = float(np.median(known))
            panel.axhline(
                median, color=BASELINE, linewidth=1.0, linestyle=(0, (4, 3)), label=f"median {median:.4g}"
            )
            panel.legend(loc="lower right")
        panel.set_ylim(bottom=0.0)
        panel.set_ylabel("clips per second")
        panel.grid(True)
        steps, waits = series(rows, "data_wait_share")
        below.fill_between(steps, 100 * waits, color=WAIT, alpha=0.45, linewidth=0)
        below.plot(steps, 100 * waits, color=WAIT, linewidth=1.0)
        highest = float(np.nanmax(100 * waits)) if np.isfinite(waits).any() else 0.0
        below.set_ylim(0.0, min(100.0, max(5.0, 1.15 * highest)))
        below.set_ylabel("data wait (%)")
        below.set_xlabel("step")
        below.grid(True)
    return figure


def series(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[Array, Array]:
    """Return the steps and the values of one name; NaN where a row has none."""
    values = [row.get(name) for row in rows]
    return (
        np.array([row["step"] for row in rows], dtype=np.int64),
        np.array([math.nan if value is None else value for value in values], dtype=np.float64),
    )


def smoothed(values: Array) -> Array:
    """Return the mean of each value and its neighbours, over about a thirtieth of the curve; NaN counts for
    nothing."""
    reach = len(values) // 60
    window = np.ones(2 * reach + 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), window)[reach : reach + len(values)]
    number = np.convolve(known.astype(np.float64), window)[reach : reach + len(values)]
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0.5)
