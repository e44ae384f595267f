# SPDX-License-Identifier: Apache-2.0
"""Pictures of an evaluation: class balance, confusion matrix, table of classes, scores over the layers.

Each `*new_figure` takes numbers and returns a matplotlib figure; `masktrain.training.drawing.save` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from masktrain.training.drawing import (
    BASELINE,
    INK,
    INTERPOLATION,
    LOSS,
    MASKED,
    VALIDATION,
    WAIT,
    colour_map,
    new_figure,
    shortened,
    style,
)

if TYPE_CHECKING:
    from masktrain.training.drawing import Axes, Figure

Array = NDArray[Any]

NAMED_CLASSES = 60  # up to which every class has its name on an axis
COUNTED_CLASSES = 20  # up to which the cells of a confusion matrix hold their numbers
TABLE_COLUMN = 30  # classes in a column of the table, more where there would be more than four columns
TABLE_CLASSES = 240  # the worst ones that the table shows
PARTS = {"train": LOSS, "valid": INTERPOLATION, "test": VALIDATION}
BASELINE_COLOURS = (BASELINE, WAIT)


def class_balance_figure(classes: Sequence[str], counts: Mapping[str, Array], title: str) -> Figure:
    """Return the clips of each class, the largest above. counts: {"train" | "valid" | "test": (K,)}, the mean over the
    splits."""
    total = np.sum(list(counts.values()), 0)
    order = np.argsort(-total, kind="stable")
    named = len(classes) <= NAMED_CLASSES
    with style():
        figure = new_figure(8.0, min(14.0, 1.5 + (0.2 if named else 0.02) * len(classes)), title)
        panel = figure.subplots()
        places, left = np.arange(len(classes)), np.zeros(len(classes))
        for part, colour in PARTS.items():
            if part in counts:
                high = 0.8 if named else 1.0
                panel.barh(places, counts[part][order], left=left, color=colour, height=high, label=part)
                left = left + counts[part][order]
        smallest, largest = total.min(), total.max()
        panel.set_title(f"{len(classes)} classes, {smallest:g} to {largest:g} clips")
        panel.set_ylim(len(classes) - 0.4, -0.6)
        _name_classes(panel, "y", [classes[k] for k in order], named)
        panel.set_xlabel("clips")
        panel.grid(True, axis="x")
        panel.set_axisbelow(True)
        figure.legend(loc="outside upper right", ncols=len(counts))
    return figure


def confusion_figure(classes: Sequence[str], counts: Array, title: str, note: str) -> Figure:
    """Return the confusion matrix as shares of each true class. counts: (K, K), rows the true classes. note: what the
    counts are."""
    total = counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
    number = len(classes)
    named = number <= NAMED_CLASSES
    side = min(14.0, 3.0 + (0.42 if number <= COUNTED_CLASSES else 0.17) * number if named else 9.0)
    with style():
        figure = new_figure(side + 1.2, side, title)
        panel = figure.subplots()
        colours = colour_map("Blues", MASKED)
        image = panel.imshow(100 * share, cmap=colours, vmin=0.0, vmax=100.0, interpolation="nearest")
        _name_classes(panel, "x", classes, named)
        _name_classes(panel, "y", classes, named)
        panel.set_xlabel("answer")
        panel.set_title(note)
        panel.set_ylabel("true class")
        if number <= COUNTED_CLASSES:
            for row, column in np.ndindex(counts.shape):
                if counts[row, column] > 0:
                    colour = "white" if share[row, column] > 0.5 else INK
                    panel.text(
                        column,
                        row,
                        f"{counts[row, column]:.3g}",
                        ha="center",
                        va="center",
                        color=colour,
                        size=7,
                    )
        bar = figure.colorbar(image, ax=panel, pad=0.02, fraction=0.046)
        bar.set_label("share of the true class (%)")
        bar.outline.set_visible(False)
    return figure


def class_table_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return a table with a line for each class, the worst above; of very many classes the worst. rows: as
    `linear.class_rows` gives them: class, clips, then scores in [0, 1] or None."""
    scores = [name for name in rows[0] if name not in ("class", "clips")]
    ordered = sorted(rows, key=lambda row: (row[scores[-1]] is None, row[scores[-1]] or 0.0))
    if len(ordered) > TABLE_CLASSES:
        title = f"{title} ({TABLE_CLASSES} worst of {len(ordered)} classes)"
        ordered = ordered[:TABLE_CLASSES]
    high = max(TABLE_COLUMN, math.ceil(len(ordered) / 4))
    columns = [ordered[i : i + high] for i in range(0, len(ordered), high)]
    longest = max(len(shortened(row["class"], 28)) for row in rows)
    width = 0.085 * longest + 0.5 + 0.8 * len(scores)
    with style():
        height = 0.9 + 0.19 * (1 + max(map(len, columns)))
        figure = new_figure(max(6.5, width * len(columns)), height, title)
        panels = figure.subplots(1, len(columns), squeeze=False)[0]
        for panel, part in zip(panels, columns, strict=True):
            _draw_table(panel, part, scores, longest, 1 + max(map(len, columns)))
    return figure


def _draw_table(
    panel: Axes, rows: Sequence[Mapping[str, Any]], scores: Sequence[str], longest: int, lines: int
) -> None:
    name_width = 0.085 * longest
    ends = [name_width + 0.5, *(name_width + 0.5 + 0.8 * (k + 1) for k in range(len(scores)))]
    panel.set_xlim(0.0, ends[-1] + 0.1)
    panel.set_ylim(lines - 0.4, -0.6)
    panel.axis("off")
    heads = ["clips", *(name.replace("average_precision", "AP") for name in scores)]
    panel.text(0.0, 0.0, "class", va="center", weight="bold", size=8)
    for end, head in zip(ends, heads, strict=True):
        panel.text(end, 0.0, head, va="center", ha="right", weight="bold", size=8)
    panel.axhline(0.5, color="#666666", linewidth=0.7)
    for line, row in enumerate(rows, 1):
        panel.text(0.0, line, shortened(row["class"], 28), va="center", size=8, parse_math=False)
        panel.text(ends[0], line, str(row["clips"]), va="center", ha="right", size=8)
        for end, name in zip(ends[1:], scores, strict=True):
            value = row[name]
            if value is not None:  # a bar under the number: what the eye compares
                panel.barh(line, 0.6 * value, left=end - 0.6, height=0.8, color=LOSS, alpha=0.25)
            text = "-" if value is None else f"{100 * value:.1f} %"
            panel.text(end, line, text, va="center", ha="right", size=8)


def layer_figure(
    layers: Sequence[int],
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    levels: Mapping[str, float],
    metric: str,
    title: str,
) -> Figure:
    """Return the score over the layers. curves: {name: (mean, low, high) for each layer}, shares. levels: {name: score}
    of features that have no layers."""
    with style():
        figure = new_figure(8.0, 4.4, title)
        panel = figure.subplots()
        panel.set_title("band: 95 % interval over seeds")
        for (name, points), colour in zip(
            curves.items(), (LOSS, VALIDATION, INTERPOLATION, WAIT, *[BASELINE] * len(curves)), strict=False
        ):
            mean, low, high = (100 * np.array(column) for column in zip(*points, strict=True))
            panel.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
            panel.plot(layers, mean, color=colour, marker="o", markersize=4, label=shortened(name))
        for (name, level), colour in zip(levels.items(), BASELINE_COLOURS, strict=False):
            panel.axhline(
                100 * level, color=colour, linewidth=1.2, linestyle=(0, (4, 3)), label=shortened(name)
            )
        panel.set_xticks(list(layers))
        panel.set_xlabel("encoder layer")
        panel.set_ylabel(f"{metric} (%)")
        panel.grid(True)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


RUN_COLOURS = (LOSS, VALIDATION, INTERPOLATION)


def accuracy_figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """Return the accuracy of frozen encoders over the steps of their pretraining, a panel for each task.

    rows: one for each task and recipe: {"task", "recipe", "curve": [{"step", "accuracy": [of each run]}],
    "scores_untrained": (seeds, splits), "logmel": {"mean"}}. A line is the mean of the runs, its band the least and the most of them; step 0
    is the untrained encoder. The dashed lines are log-mel statistics in the recipe's front end.
    """
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    with style():
        figure = new_figure(5.2 * len(tasks), 4.4, title)
        for panel, task in zip(figure.subplots(1, len(tasks), squeeze=False).flat, tasks, strict=True):
            for row in (row for row in rows if row["task"] == task):
                colour = RUN_COLOURS[recipes.index(row["recipe"]) % len(RUN_COLOURS)]
                untrained = np.mean(row["scores_untrained"], axis=1).tolist()
                steps = [0, *(point["step"] for point in row["curve"])]
                runs = [untrained, *(point["accuracy"] for point in row["curve"])]
                low, high = [min(values) for values in runs], [max(values) for values in runs]
                mean = [float(np.mean(values)) for values in runs]
                shares = [step / steps[-1] for step in steps]
                panel.fill_between(
                    shares, 100 * np.array(low), 100 * np.array(high), color=colour, alpha=0.15
                )
                label = f"{row['recipe']} ({steps[-1]} steps)"
                panel.plot(shares, 100 * np.array(mean), "o-", color=colour, markersize=3, label=label)
                panel.axhline(100 * row["logmel"]["mean"], color=colour, linewidth=1.0, linestyle=(0, (4, 3)))
            panel.set_title(task)
            panel.set_xlabel("share of the pretraining run")
            panel.set_ylabel("test accuracy, %")
            panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(recipes))
    return figure


def _name_classes(panel: Axes, axis: str, classes: Sequence[str], named: bool) -> None:
    shown = [shortened(name, 24) for name in classes]
    if axis == "x":
        if named:
            panel.set_xticks(range(len(shown)), shown, rotation=90, parse_math=False)
    elif named:
        panel.set_yticks(range(len(shown)), shown, parse_math=False)
