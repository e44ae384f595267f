# SPDX-License-Identifier: Apache-2.0
"""Pictures against the numbers they are drawn from: cells, colours, ticks, curves, and files that are PNG."""

from __future__ import annotations

import logging
import math
import os
import re
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from masktrain.errors import RunError
from masktrain.training.drawing import DPI, MASKED, save
from masktrain.training.pictures import (
    DECIBEL,
    MaskRate,
    MelAxes,
    Reconstruction,
    Validation,
    colour_range,
    error_figure,
    loss_figure,
    mask_grids,
    mask_rate_figure,
    reconstruction_figure,
    series,
    smoothed,
    throughput_figure,
)
from masktrain.types import MaskPlan, Spectrogram, TokenGrid, cumulative

BINS = 64


def mel_axes(bins: int = BINS) -> MelAxes:
    """Centres of a mel bank from 20 Hz to 8 kHz (m = 1127 ln(1 + f / 700), as Kaldi has it)."""
    low, high = (1127 * math.log1p(hz / 700) for hz in (20, 8000))
    return MelAxes(700 * np.expm1(np.linspace(low, high, bins + 2)[1:-1] / 1127), 0.01)


def clip(
    frames: int = 90, name: str = "a.wav", seed: int = 0, patch: tuple[int, int] = (16, 16)
) -> Reconstruction:
    """A clip whose masked share is about three quarters, in patches of (bins, frames)."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(-5, 1.5, (frames, BINS)).astype(np.float32)
    tokens = rng.random((-(-frames // patch[1]), BINS // patch[0])) < 0.75
    masked = np.kron(tokens, np.ones(patch[::-1], bool))[:frames]
    return Reconstruction(
        name, truth, truth + rng.normal(0, 1, truth.shape).astype(np.float32), masked, 0.84, 2.1, 0.9
    )


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.images]


def agg(figure: Any) -> Any:
    """Draw the figure at its own size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


# --- reconstruction ---


def test_the_composed_picture_is_the_input_where_visible_and_the_prediction_where_masked() -> None:
    one = clip()
    figure = reconstruction_figure([one], mel_axes(), "after 10 steps")
    above, middle, below = (axes.images[0].get_array() for axes in panels(figure))
    masked = one.masked.T
    assert 0.5 < masked.mean() < 1
    np.testing.assert_allclose(above, one.input.T * DECIBEL, rtol=1e-6)
    # what the model saw: the input, and nothing where it was masked
    assert np.array_equal(np.ma.getmaskarray(middle), masked)
    np.testing.assert_allclose(middle.compressed(), (one.input.T * DECIBEL)[~masked], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(below)[~masked], (one.input.T * DECIBEL)[~masked], rtol=1e-6)
    np.testing.assert_allclose(np.asarray(below)[masked], (one.prediction.T * DECIBEL)[masked], rtol=1e-6)


def test_decibels_are_those_of_a_natural_log_power() -> None:
    assert math.log(1e-3) * DECIBEL == pytest.approx(-30)


def test_the_pixels_of_masked_cells_are_grey_and_no_others() -> None:
    one = clip(96, patch=(16, 32))
    figure = reconstruction_figure([one], mel_axes(), "")
    pixels = np.asarray(agg(figure).buffer_rgba())[..., :3]
    box = panels(figure)[1].get_window_extent()
    height = pixels.shape[0]
    grey = np.array([int(MASKED[i : i + 2], 16) for i in (1, 3, 5)])
    for frame in range(8, 96, 16):
        for bin_ in range(8, BINS, 16):
            x = box.x0 + (frame + 0.5) / 96 * box.width
            y = height - (box.y0 + (bin_ + 0.5) / BINS * box.height)
            shown = bool(np.abs(pixels[int(y), int(x)].astype(int) - grey).max() <= 2)
            assert shown == bool(one.masked[frame, bin_]), (frame, bin_)


def test_one_range_and_one_bar_for_a_clip() -> None:
    one = clip()
    figure = reconstruction_figure([one, clip(80, seed=1)], mel_axes(), "")
    assert len(panels(figure)) == 6
    ranges = [axes.images[0].get_clim() for axes in panels(figure)]
    assert len(set(ranges[:3])) == 1 and len(set(ranges[3:])) == 1 and ranges[0] != ranges[3]
    assert ranges[0] == pytest.approx((one.input.min() * DECIBEL, one.input.max() * DECIBEL), rel=1e-5)
    bars = [axes.get_ylabel() for axes in figure.axes if not axes.images]
    assert bars == ["log-mel power (dB)"] * 2


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([-200.0, -10.0, 5.0], (-75.0, 5.0)),  # digital silence does not stretch the range
        ([-30.0, 10.0, math.nan, -math.inf, math.inf], (-30.0, 10.0)),
        ([4.0, 4.0], (3.0, 4.0)),
        ([math.nan], (-80.0, 0.0)),
    ],
)
def test_colour_ranges(cells: list[float], expected: tuple[float, float]) -> None:
    assert colour_range(np.array(cells)) == expected


def test_axes_are_in_seconds_and_hz() -> None:
    axes = mel_axes()
    figure = reconstruction_figure([clip(90)], axes, "")
    for panel in panels(figure):
        left, right, bottom, top = panel.images[0].get_extent()
        assert (left, right, bottom, top) == (0.0, pytest.approx(0.9), 0.0, BINS)
        ticks = {
            label.get_text(): position
            for position, label in zip(panel.get_yticks(), panel.get_yticklabels(), strict=True)
        }
        assert "1000" in ticks and len(ticks) >= 3
        for hz, position in ticks.items():
            # the centre of bin k is drawn at k + 0.5
            below = int(position - 0.5)
            share = position - 0.5 - below
            centre = axes.centres_hz[below] * (1 - share) + axes.centres_hz[below + 1] * share
            assert centre == pytest.approx(float(hz), rel=1e-9)
        assert "(Hz)" in panel.get_ylabel()
    assert panels(figure)[2].get_xlabel() == "time (s)"


@pytest.mark.parametrize("height", [0.5, 1.25, 4.0])
@pytest.mark.parametrize("bins", [40, 80, 128])
def test_ticks_are_far_enough_apart_to_be_read(height: float, bins: int) -> None:
    positions, labels = mel_axes(bins).ticks(height)
    assert labels == sorted(labels, key=int)
    assert np.diff(positions).min(initial=math.inf) >= 0.17 / height * bins
    # a line of 8 point needs 0.11 inches
    assert np.diff(positions).min(initial=math.inf) / bins * height > 0.11


@pytest.mark.parametrize(
    ("frames", "patch_time", "columns"), [(28, 2, 2), (500, 2, 2), (1000, 2, 1), (1000, 16, 2)]
)
def test_long_clips_of_short_tokens_are_drawn_wide(frames: int, patch_time: int, columns: int) -> None:
    figure = reconstruction_figure(
        [clip(frames, patch=(BINS, patch_time)), clip(frames, patch=(BINS, patch_time))],
        mel_axes(),
        "",
        patch_time,
    )
    agg(figure)
    first = panels(figure)[0].get_window_extent()
    pixels_per_token = first.width * DPI / figure.dpi / math.ceil(frames / patch_time)
    assert pixels_per_token > 2.5
    assert len({round(axes.get_window_extent().x0) for axes in panels(figure)}) == columns


def test_titles_fit_their_column_and_names_are_taken_literally(tmp_path: Path) -> None:
    names = ["$\\frac{x$ 日本 \udcff\n" + "long" * 40 + ".wav", "b_{1}^$.wav"]
    figure = reconstruction_figure(
        [clip(name=name, seed=i) for i, name in enumerate(names)], mel_axes(), "$x_$ run"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "r.png")
    first, second = panels(figure)[0], panels(figure)[3]
    text = first.get_title(loc="left")
    assert (
        "\nsquared error 0.84 (interpolated in time 0.9, per-bin mean 2.1)" in text
        and "\\udcff\\n" not in text[:12]
        and text.startswith("$\\frac{x$ 日")
    )
    assert second.get_title(loc="left").startswith("b_{1}^$.wav")
    assert f"{100 * clip(seed=0).masked.mean():.0f} % masked" in text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extent = first._left_title.get_window_extent(agg(figure).get_renderer())
    assert extent.x1 < second.get_window_extent().x0


def test_shapes_that_do_not_fit_are_refused() -> None:
    one = clip()
    with pytest.raises(ValueError, match="no clips"):
        reconstruction_figure([], mel_axes(), "")
    with pytest.raises(ValueError, match="differ"):
        reconstruction_figure(
            [Reconstruction("x", one.input[1:], one.prediction, one.masked, 0.0, 0.0, 0.0)], mel_axes(), ""
        )
    with pytest.raises(ValueError, match="64 bins, 40 centres"):
        reconstruction_figure([one], mel_axes(40), "")


# --- mask rate ---


def plan_of(order: str, columns: tuple[int, ...], masked: list[int]) -> MaskPlan:
    grid = TokenGrid(freq=2, patch_freq=4, patch_time=3, order=order)  # type: ignore[arg-type]
    lengths = tuple(3 * n for n in columns)
    spectrogram = Spectrogram(
        torch.zeros(sum(lengths), 8),
        lengths,
        cumulative(lengths, torch.int64, "cpu"),
        torch.arange(len(columns)),
    )
    layout = grid.layout(spectrogram)
    hidden = torch.tensor(masked, dtype=torch.int32)
    seen = torch.tensor([t for t in range(sum(layout.lengths)) if t not in masked], dtype=torch.int32)
    counts = (0,) * len(columns)
    cu = cumulative(counts, torch.int32, "cpu")
    return MaskPlan(layout, seen, hidden, counts, counts, cu, cu)


def test_grids_follow_the_token_order() -> None:
    # clips of 3 and 2 columns, two rows of frequency: tokens 0-5 and 6-9
    time_major = mask_grids(plan_of("time", (3, 2), [0, 3, 9]))
    assert [grid.astype(int).tolist() for grid in time_major] == [[[1, 0, 0], [0, 1, 0]], [[0, 0], [0, 1]]]
    freq_major = mask_grids(plan_of("freq", (3, 2), [0, 3, 9]))
    assert [grid.astype(int).tolist() for grid in freq_major] == [[[1, 0, 0], [1, 0, 0]], [[0, 0], [0, 1]]]


def test_rates_count_only_the_clips_that_have_the_token() -> None:
    rate = MaskRate(2)
    rate.add(np.array([[True, False, True], [False, False, True]]))
    rate.add(np.array([[True], [True]]))
    assert rate.drawn.tolist() == [[2, 1, 1], [2, 1, 1]]
    assert rate.rate().tolist() == [[1.0, 0.0, 1.0], [0.5, 0.0, 1.0]]


@pytest.mark.parametrize(("freq", "patch"), [(1, (BINS, 2)), (4, (16, 16))])
def test_the_map_shows_the_rates_and_their_numbers(freq: int, patch: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rate = MaskRate(freq)
    for _ in range(200):
        rate.add(rng.random((freq, 30)) < 0.75)
    figure = mask_rate_figure(rate, mel_axes(), patch[1], patch[0], "masks")
    panel, *_ = panels(figure)
    np.testing.assert_array_equal(np.asarray(panel.images[0].get_array()), rate.masked / 200)
    assert panel.images[0].get_extent() == [0.0, pytest.approx(30 * patch[1] * 0.01), 0.0, BINS]
    shares, mean = rate.masked / 200, rate.masked.sum() / rate.drawn.sum()
    text = panel.get_title(loc="left")
    assert text.startswith(f"min {shares.min():.3f}, mean {mean:.3f}, max {shares.max():.3f} of 200 plans")
    # three standard deviations of a share of 200 draws
    assert f"±{3 * math.sqrt(mean * (1 - mean) / 200):.3f}" in text
    low, high = panel.images[0].get_clim()
    assert (low + high) / 2 == pytest.approx(mean)
    assert low <= shares.min() and high >= shares.max()
    save(figure, tmp_path / "map.png")


def test_a_strategy_that_neglects_a_row_stands_out_of_the_map() -> None:
    """The row's share lies outside of what chance makes, and the colours reach as far."""
    rng = np.random.default_rng(2)
    rate = MaskRate(4)
    for _ in range(400):
        rate.add(rng.random((4, 30)) < np.array([[0.35], [0.75], [0.75], [0.75]]))
    panel = panels(mask_rate_figure(rate, mel_axes(), 16, 16, ""))[0]
    found = re.match(r"min ([\d.]+), mean ([\d.]+), .*±([\d.]+) ", panel.get_title(loc="left"))
    assert found is not None
    lowest, mean, chance = map(float, found.groups())
    assert mean - lowest > 3 * chance and panel.images[0].get_clim()[0] == pytest.approx(lowest, abs=1e-3)


def test_tokens_that_few_clips_reach_are_left_out_of_the_map() -> None:
    rate = MaskRate(1)
    for index in range(100):
        rate.add(np.ones((1, 4 if index < 5 else 3), bool) * (index % 2 == 0))
    figure = mask_rate_figure(rate, mel_axes(), 2, BINS, "")
    cells = panels(figure)[0].images[0].get_array()
    assert np.ma.getmaskarray(cells).tolist() == [[False, False, False, True]]
    assert "grey: under 20 plans" in panels(figure)[0].get_title(loc="left")
    with pytest.raises(ValueError, match="no plan"):
        mask_rate_figure(MaskRate(1), mel_axes(), 2, BINS, "")


# --- curves ---


def rows(count: int = 50) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": 10.0 / step,
            "loss_mse": 0.9 / step,
            "loss_info_nce": 1.0 / step,
            "loss_max": 99.0,
            "lr": 1e-3 * step,
            "clips_per_s": None if step == 1 else 100.0 + step,
            "data_wait_share": None if step == 1 else 0.02,
        }
        for step in range(1, count + 1)
    ]


VALIDATIONS = [
    Validation(0, 12.0, {"mse": 1.1, "info_nce": 1.3}, 6.5, {"mse": 0.5, "info_nce": 1.5}),
    Validation(50, 3.0, {"mse": 0.2, "info_nce": 1.0}, 6.5, {"mse": 0.5, "info_nce": 1.5}),
]


def drawn(panel: Any, label: str) -> tuple[list[float], list[float]]:
    (line,) = [line for line in panel.get_lines() if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_loss_figure_shows_loss_parts_points_baseline_and_rate() -> None:
    figure = loss_figure(rows(), VALIDATIONS, "run")
    total, rate, mse, nce = figure.axes
    raw = total.get_lines()[0]
    assert list(raw.get_xdata()) == list(range(1, 51))
    np.testing.assert_allclose(raw.get_ydata(), [10.0 / step for step in range(1, 51)])
    assert drawn(total, "held-out clips") == ([0, 50], [12.0, 3.0])
    assert set(drawn(total, "per-bin mean as prediction")[1]) == {6.5}
    np.testing.assert_allclose(drawn(rate, "learning rate")[1], [1e-3 * step for step in range(1, 51)])
    assert rate.get_ylabel() == "learning rate" and total.get_ylabel() == "loss"
    for panel, name, key, baseline in ((mse, "mse", 0.9, 0.5), (nce, "info_nce", 1.0, 1.5)):
        assert panel.get_title(loc="left") == name and panel.get_xlabel() == "step"
        np.testing.assert_allclose(panel.get_lines()[0].get_ydata(), [key / step for step in range(1, 51)])
        assert set(drawn(panel, "per-bin mean as prediction")[1]) == {baseline}
    names = [text.get_text() for text in total.get_legend().get_texts()]
    assert names == ["training", "held-out clips", "per-bin mean as prediction", "learning rate"]


def test_the_error_figure_shows_shares_of_the_per_bin_mean() -> None:
    def run(*errors: float | None) -> list[Validation]:
        return [Validation(10 * i, 1.0, {}, 1.0, {}, e, 0.5, 0.2) for i, e in enumerate(errors)]

    runs = {f"recipe_{n}": run(0.75, 0.3, 0.1 * n) for n in range(1, 6)}
    figure = error_figure({**runs, "lost": run(None)}, "learning")
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert len(shown) == 6
    steps, shares = drawn(shown[1], "model")
    assert list(steps) == [0, 10, 20]
    np.testing.assert_allclose(shares, [1.5, 0.6, 0.4])
    assert set(drawn(shown[1], "interpolated in time")[1]) == {0.4}
    assert set(drawn(shown[1], "per-bin mean")[1]) == {1.0}
    assert shown[1].get_title(loc="left") == "recipe_2\n0.40 x per-bin mean, 1.00 x interpolated"
    assert shown[5].get_title(loc="left") == "lost" and shown[0].get_ylim()[0] == 0
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="no evaluations"):
            error_figure(nothing, "")


def test_the_median_clip_is_labelled_and_notes_stand_at_the_foot() -> None:
    labelled = replace(clip(), median_of=68)
    figure = reconstruction_figure([labelled, clip()], mel_axes(), "", note="of the visible context")
    titles = [panel.get_title(loc="left") for panel in panels(figure) if panel.get_title(loc="left")]
    assert titles[0].startswith("median error of 68 clips: a.wav") and titles[1].startswith("a.wav")
    assert figure._supxlabel.get_text() == "of the visible context"


def test_curves_of_rows_with_holes_and_of_one_row(tmp_path: Path) -> None:
    broken = rows()
    for row in broken[10:20]:
        row["loss"] = None
    lost = Validation(50, None, {"mse": None}, None, {})  # type: ignore[arg-type, dict-item]
    figures = [
        loss_figure(broken, [*VALIDATIONS, lost], ""),
        loss_figure(rows(1), [], ""),
        loss_figure([{"step": 1, "loss": 2.0, "lr": 1e-3}], [], ""),
        throughput_figure(rows(1), ""),
        throughput_figure(broken, ""),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for index, figure in enumerate(figures):
            save(figure, tmp_path / f"{index}.png")
    assert np.isnan(np.asarray(figures[0].axes[0].get_lines()[0].get_ydata(), float)[10:20]).all()
    for draw in (lambda: loss_figure([], [], ""), lambda: throughput_figure([], "")):
        with pytest.raises(ValueError, match="no rows"):
            draw()


def test_throughput_shows_rates_and_waits_in_percent() -> None:
    clips, waits = throughput_figure(rows(), "").axes
    values = np.asarray(clips.get_lines()[0].get_ydata(), float)
    assert math.isnan(values[0]) and values[1:].tolist() == [100.0 + step for step in range(2, 51)]
    assert clips.get_ylabel() == "clips per second" and clips.get_ylim()[0] == 0
    assert np.asarray(waits.get_lines()[0].get_ydata(), float)[1:].tolist() == [2.0] * 49
    assert waits.get_ylabel() == "data wait (%)"


def test_smoothing_is_the_mean_of_the_known_neighbours() -> None:
    values = np.arange(120.0)
    values[3] = math.nan
    found = smoothed(values)  # two neighbours on each side
    assert found[60] == pytest.approx(60)
    assert found[0] == pytest.approx((0 + 1 + 2) / 3)
    assert found[4] == pytest.approx((2 + 4 + 5 + 6) / 4)
    assert found[119] == pytest.approx(118)
    short = np.array([1.0, math.nan, 3.0])
    np.testing.assert_array_equal(smoothed(short), short)


def test_series_take_null_for_unknown() -> None:
    steps, values = series([{"step": 3, "x": 1}, {"step": 9, "x": None}, {"step": 12}], "x")
    assert steps.tolist() == [3, 9, 12]
    np.testing.assert_array_equal(values, [1.0, math.nan, math.nan])


# --- files ---


def test_a_saved_picture_is_a_png_of_the_expected_size(tmp_path: Path) -> None:
    path = tmp_path / "pictures" / "loss.png"
    data = save(loss_figure(rows(), VALIDATIONS, "run"), path)
    assert path.read_bytes() == data
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (round(9.0 * DPI), round(6.4 * DPI))
    from matplotlib.image import imread

    pixels = imread(path)
    assert pixels.shape == (960, 1350, 4)
    assert (pixels[..., 3] == 1).all() and 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.4
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


def test_a_picture_that_cannot_be_written_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"loss\.png could not be written"):
        save(loss_figure(rows(3), [], ""), tmp_path / "file" / "loss.png")


def test_nothing_depends_on_the_user_s_matplotlib(tmp_path: Path) -> None:
    """No display, a hostile matplotlibrc, a home that cannot be written: the same picture and not a word."""
    (tmp_path / "matplotlibrc").write_text(
        "backend: TkAgg\ntext.usetex: True\nfigure.dpi: 30\nlines.linewidth: 40\n"
    )
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from masktrain.training import drawing, pictures\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from test_pictures import rows, VALIDATIONS\n"
        "drawing.save(pictures.loss_figure(rows(), VALIDATIONS, 'run'), Path(sys.argv[2]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "there.png")]
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MPLBACKEND", "MPLCONFIGDIR")}
    environment |= {
        "HOME": "/proc/nothing",
        "XDG_CONFIG_HOME": "/proc/nothing",
        "XDG_CACHE_HOME": "/proc/nothing",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    save(loss_figure(rows(), VALIDATIONS, "run"), tmp_path / "here.png")
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_settings_of_the_caller_are_left_as_they_were() -> None:
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 7.0}):
        loss_figure(rows(3), [], "")
        assert matplotlib.rcParams["lines.linewidth"] == 7.0
    assert logging.getLogger("matplotlib").level == logging.ERROR
