# SPDX-License-Identifier: Apache-2.0
"""The picture of the masking benchmark: shares of a training step on the left, growth with the clip on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from masktrain.training.drawing import BASELINE, INK, LOSS, VALIDATION, new_figure, style, swatch
from masktrain.training.masking_bench.rows import STEP, exponents

if TYPE_CHECKING:
    from masktrain.training.drawing import Axes, Figure

OURS, PUBLISHED, OTHER = LOSS, VALIDATION, BASELINE
LABELS = {
    "random": "random",
    "inverse_block": "inverse block",
    "inverse_block_published_loop": "inverse block as published: host loop",
    "dispersion": "dispersion",
    "self_guided_cached": "self-guided, stored scores",
    "self_guided_solver": "self-guided, the solver alone",
    "self_guided_early_layer": "self-guided, features of an early layer",
    "self_guided_fresh": "self-guided, features of the last layer",
    "self_guided_published_pca": "self-guided as published: randomised PCA",
    "self_guided_published_eigh": "self-guided as published: eigh",
    "self_guided_published_eigh_loop": "self-guided as published: eigh in a loop",
}
GROWS = 0.5  # the least exponent that is told
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
PERCENT = ((0.0001, "0.01 %"), (0.001, "0.1 %"), (0.01, "1 %"), (0.1, "10 %"), (1.0, "100 %"), (10.0, "10 x"), (100.0, "100 x"))  # fmt: skip


def colour(strategy: str) -> str:
    """Return the colour of a strategy: ours, as published, or the random masks that both are compared with."""
    return PUBLISHED if "published" in strategy else OTHER if strategy == "random" else OURS


def cost_figure(report: Mapping[str, Any]) -> Figure:
    """Return the figure of what `masktrain bench masking --json` wrote. Of each recipe the largest batch is drawn."""
    rows = [row for row in report["rows"] if row["status"] == "ok" and "share_of_step" in row]
    largest = {
        name: max(r["clips"] for r in rows if r["recipe"] == name) for name in {r["recipe"] for r in rows}
    }
    rows = [row for row in rows if row["clips"] == largest[row["recipe"]] and row["strategy"] != STEP]
    scaling: Sequence[Mapping[str, Any]] = report["scaling"]
    with style():
        figure = new_figure(12.0, 6.2, "What drawing the masks of a batch costs")
        left, right = (
            figure.subplots(1, 2, width_ratios=(1.75, 1.0)) if scaling else (figure.subplots(), None)
        )
        _draw_shares(left, rows, _measured_on(report, rows))
        if right is not None:
            _draw_scaling(right, scaling)
    return figure


def _measured_on(report: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    made, sizes = report["made_with"], sorted({row["size"] for row in rows})
    precisions = sorted({row["precision"] for row in rows})
    threads = f", {made['threads']} thread{'s' if made['threads'] > 1 else ''}" if "threads" in made else ""
    return f"{made['device']}{threads}, {', '.join(precisions)}; models of size {', '.join(sizes)}"


def _draw_shares(panel: Axes, rows: Sequence[Mapping[str, Any]], machine: str) -> None:
    recipes = list(dict.fromkeys((row["recipe"], row["grid"], row["clips"]) for row in rows))
    names = [name for name in LABELS if any(row["strategy"] == name for row in rows)]
    places = {name: len(names) - 1 - i for i, name in enumerate(names)}
    panel.axvline(1.0, color=INK, linewidth=1.2)
    shares = [row["share_of_step"] for row in rows]
    low, high = min(shares) / 2, max(1.0, *shares) * 6
    for name in names:
        own = [row for row in rows if row["strategy"] == name]
        y, middle = places[name], median(row["share_of_step"] for row in own)
        panel.plot([low, middle], [y, y], color=colour(name), linewidth=7, alpha=0.3, solid_capstyle="butt")
        refreshed = [r["share_of_step_with_refresh"] for r in own if "share_of_step_with_refresh" in r]
        reach = max(row["share_of_step"] for row in own)
        note = _share(middle)
        if refreshed:
            end = median(refreshed)
            reach = max(reach, end)
            panel.plot([middle, end], [y, y], color=colour(name), linewidth=1.6, linestyle=(0, (2, 2)))
            panel.plot([end], [y], "|", color=colour(name), markersize=11, markeredgewidth=1.6)
            note += f", {_share(end)} with refreshes"
        for (recipe, _, _), marker in zip(recipes, MARKERS, strict=False):
            found = [row["share_of_step"] for row in own if row["recipe"] == recipe]
            panel.plot(found, [y] * len(found), marker, color=colour(name), markersize=5, markeredgecolor="white", markeredgewidth=0.5)  # fmt: skip
        goals = [row["goal_share"] for row in own if "goal_share" in row]
        if goals:
            panel.plot([goals[0]] * 2, [y - 0.38, y + 0.38], color=INK, linewidth=1.0, linestyle=(0, (1, 1)))
        panel.annotate(
            note, (reach, y), (8, 0), textcoords="offset points", va="center", fontsize=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    panel.annotate("a whole\ntraining step", (1.0, -0.75), (-4, 0), textcoords="offset points", ha="right", va="center", fontsize=8)  # fmt: skip
    panel.set_xscale("log")
    panel.set_xlim(low, high)
    panel.set_ylim(-1.1, len(names) - 0.4)
    panel.set_xticks([value for value, _ in PERCENT if low <= value <= high])
    panel.set_xticklabels([text for value, text in PERCENT if low <= value <= high])
    panel.minorticks_off()
    panel.set_yticks(list(places.values()), [LABELS[name] for name in names])
    for label, name in zip(panel.get_yticklabels(), names, strict=True):
        label.set_color(colour(name))
    panel.set_xlabel("time to draw the masks / time of the recipe's training step (log scale)")
    panel.set_title(f"as a share of a training step: median of the recipes, and each of them\n{machine}", parse_math=False)  # fmt: skip
    panel.grid(True, axis="x")
    handles = [swatch(OURS, "ours"), swatch(PUBLISHED, "as published")]
    for (recipe, grid, clips), marker in zip(recipes, MARKERS, strict=False):
        shown = f"{recipe}, {grid}, {clips} clips"
        handles += panel.plot([], [], marker, color=INK, markersize=5, label=shown)
    epochs = {row["refresh_epochs"] for row in rows if "refresh_epochs" in row}
    for every in epochs:
        shown = f"with refreshes every {every} epochs"
        handles += panel.plot([], [], color=OURS, linewidth=1.6, linestyle=(0, (2, 2)), label=shown)
    if any("goal_share" in row for row in rows):
        handles += panel.plot([], [], color=INK, linestyle=(0, (1, 1)), label="goal")
    figure = panel.get_figure()
    assert figure is not None
    figure.legend(handles=handles, loc="outside lower left", ncols=6)


def _share(value: float) -> str:
    return (
        f"{value:.1f} x"
        if value >= 2
        else f"{100 * value:.2g} %"
        if value < 0.995
        else f"{100 * value:.0f} %"
    )


def _draw_scaling(panel: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    names = [name for name in LABELS if any(row["strategy"] == name for row in rows)]
    growth = exponents(rows)
    longest = max(row["tokens"] for row in rows)
    ends = []
    for name in names:
        points = sorted((row["tokens"], row["median_ms"]) for row in rows if row["strategy"] == name)
        x, y = zip(*points, strict=True)
        line = "-" if "loop" not in name else (0, (4, 2))
        panel.plot(x, y, marker="o", markersize=3.5, color=colour(name), linestyle=line)
        # below that a call costs the same whatever it does
        grows = growth.get(name, 0.0) >= GROWS
        text = f"{_short(name)}, N^{growth[name]:.1f}" if grows else _short(name)
        ends.append((y[-1], text, colour(name)))
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.minorticks_off()
    tokens = sorted({row["tokens"] for row in rows})
    panel.set_xticks(tokens, [str(n) for n in tokens])
    panel.set_xlim(tokens[0] / 1.15, longest * 1.1)
    bottom, top = panel.get_ylim()
    least = (top / bottom) ** 0.042
    placed = 0.0
    for y, text, shade in sorted(ends):
        placed = max(y, placed * least)
        panel.annotate(text, (longest, y), (longest * 1.16, placed), color=shade, va="center", fontsize=8, parse_math=False)  # fmt: skip
    panel.set_xlabel("tokens of a clip, N")
    panel.set_ylabel("milliseconds a batch")
    panel.set_title(f"growth with the clip, features given\n{rows[0]['clips']} clips, features of width {rows[0]['width']}")  # fmt: skip
    panel.grid(True)


def _short(name: str) -> str:
    short = {
        "self_guided_solver": "self-guided solver",
        "self_guided_published_pca": "randomised PCA",
        "self_guided_published_eigh": "published eigh",
        "self_guided_published_eigh_loop": "eigh in a loop",
    }
    return short.get(name, LABELS[name])
