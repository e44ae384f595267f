# SPDX-License-Identifier: Apache-2.0
"""Writes the measured results into the pages that show them, from the rows under benchmarks/results.

python benchmarks/readme_results.py            # rewrite the sections
python benchmarks/readme_results.py --check    # exit 1 if one is not what the rows say

A section stands between `<!-- NAME -->` and `<!-- /NAME -->`; SECTIONS says which page has which.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results" / "cpu"


def steps() -> list[str]:
    """Return the table of training steps beside plain transcriptions: the last row of each case."""
    lines = (RESULTS / "steps.jsonl").read_text().splitlines()
    rows = {row["case"]: row for row in map(json.loads, lines)}
    first = next(iter(rows.values()))
    table = [
        "| case | clips | threads | ours, ms | plain, ms | faster (p20 to p80) | less memory | FLOPs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case, row in rows.items():
        ratio = row["ratio"]
        table.append(
            f"| {case} | {row['clips']} | {row['threads']} | {row['ours_ms']['median']:.0f} | "
            f"{row['plain_ms']['median']:.0f} | {ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f}) | "
            f"{row['peak_ratio']:.2f}x | {row['flop_ratio']:.2f}x |"
        )
    return [
        "A whole training step against a plain PyTorch transcription of the same method (embed all, shuffle, gather, "
        "attention weights as a tensor, every row through every layer; benchmarks/plain), with the same weights, "
        f"masks, float32, dropout and optimiser, losses equal in the same run: interleaved rounds on "
        f"{first['device']}, {first['cpus']} cores, torch {first['torch']}, {first['date']}. "
        "`benchmarks/step_against_plain.py` measures them.",
        "",
        *table,
    ]


def learning() -> list[str]:
    """Return the table of what each recipe has learnt: its last row."""
    lines = (RESULTS / "learning.jsonl").read_text().splitlines()
    rows = {row["recipe"]: row for row in sorted(map(json.loads, lines), key=lambda row: row["recipe"])}
    first = next(iter(rows.values()))
    dates = sorted({row["date"] for row in rows.values()})
    table = [
        "| recipe | steps x clips | minutes | error | of per-bin mean (untrained) | of interpolation |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows.values():
        name = f"{row['recipe']}*" if row["norm_pix_loss"] else row["recipe"]
        table.append(
            f"| {name} | {row['steps']} x {row['batch_size']} | {row['seconds'] / 60:.1f} | {row['error']:.3f} | "
            f"{row['of_bin_mean']:.2f} ({row['error_untrained'] / row['error_bin_mean']:.2f}) | "
            f"{row['of_interpolation']:.2f} |"
        )
    own = ", ".join(
        f"{row['recipe']} {row['mse']:.2f} ({row['mse_bin_mean']:.2f})"
        for row in rows.values()
        if row["norm_pix_loss"]
    )
    loads = [row["load_before"] for row in rows.values()]
    above = [row for row in rows.values() if row["of_interpolation"] >= 1]
    shares = ", ".join(f"{row['error_interpolation'] / row['error_bin_mean']:.2f}" for row in above)
    changed = {row["recipe"]: _changed(row["command"]) for row in rows.values()}
    apart = "; ".join(f"{recipe} with `{options}`" for recipe, options in changed.items() if options)
    short = [
        f"Not yet below interpolation: {', '.join(row['recipe'] for row in above)}, where interpolation's own error is "
        f"{shares} of the per-bin mean's: a visible frame is rarely far from a masked one.",
        "",
    ]
    return [
        f"The recipes at size `tiny` (variants such as `_6l` and `_small` left out), trained on ESC-10 (44.1 kHz Ogg, 5 s) and FSDD (8 kHz WAV, 0.1 to 2.3 s) together "
        f"with {first['threads']} thread on {first['cpu']}, {first['cores']} cores, torch {first['packages']['torch']}, "
        f"{' to '.join(dates)}; other work was running (load {min(loads):.1f} to {max(loads):.1f}), which the minutes "
        f"show. The error is the mean squared error of the masked values of the normalised log-mel on held-out clips, "
        "beside that of two predictors that learn nothing: the mean of each mel bin, and linear interpolation in time "
        "between the visible frames of the clip. The recipes ran as they are, but for what so short a run needs: "
        f"{apart}. `benchmarks/learning.py` measures it:",
        "",
        f"    {first['command']}",
        "",
        *table,
        "",
        *(short if above else []),
        f"*: targets are standardised patch by patch (norm_pix_loss), so that the model predicts neither level nor "
        "contrast of a patch; for the error both are interpolated in time from the visible patches, which needs "
        "no training and gives most of what is gained on the per-bin mean. The squared error of the standardised targets "
        f"themselves is (per-bin mean in brackets): {own}.",
        "",
        "![Error of masked cells on held-out clips, by recipe](benchmarks/results/cpu/learning/error.png)",
        "",
        "![mae_ast_frame: input, what the model saw, reconstruction, of the median clip and of others]"
        "(benchmarks/results/cpu/learning/mae_ast_frame.png)",
    ]


def _changed(command: str) -> str:
    """Return the options of a row's command that change the recipe."""
    words = command.split()
    pairs = zip(words[2::2], words[3::2], strict=True)  # behind `masktrain run`
    shared = {"--recipe", "--size", "--steps", "--device", "--data"}
    shared |= {"--train.validation-clips", "--schedule.evaluate-every"}
    return " ".join(f"{name} {value}" for name, value in pairs if name not in shared)


LARGE = 256  # clips from which a gathered output is larger than any cache


def kernels() -> list[str]:
    """Return the table of the native ops: medians of interleaved rounds, as ratios, with one thread and two."""
    rows = [json.loads(line) for line in (RESULTS / "kernels.jsonl").read_text().splitlines()]
    times = {(r["op"], str(r["size"]), r["provider"], r["threads"]): r["median_ms"] for r in rows}
    table = [
        "| op | case | native, ms (1, 2 threads) | against | ratio (1, 2 threads) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        op, size, other = row["op"], str(row["size"]), row["provider"]
        # the reference is the definition, not a rival; copies are ceilings, of large outputs only
        ceiling = other == "copy into new memory" and row["size"]["clips"] >= LARGE
        if row["threads"] != 1 or other in ("native", "reference") or ("copy" in other and not ceiling):
            continue
        ours = [times[op, size, "native", threads] for threads in (1, 2)]
        ratios = [times[op, size, other, threads] / mine for threads, mine in zip((1, 2), ours, strict=True)]
        case = ", ".join(f"{name} {value}" for name, value in row["size"].items())
        digits = 2 if ceiling else 1
        table.append(
            f"| {op} | {case} | {ours[0]:.3g}, {ours[1]:.3g} | {other} | "
            f"{ratios[0]:.{digits}f}x, {ratios[1]:.{digits}f}x |"
        )
    first: dict[str, Any] = rows[0]
    loads = [row["load_before"] for row in rows]
    return [
        f"Native CPU ops, medians of {first['rounds']} interleaved rounds on {first['machine']}, "
        f"{first['cores']} cores, {first['instruction_set']}, torch {first['torch']}, {first['date']} (load "
        f"{min(loads):.1f} to {max(loads):.1f}). The ratio is the other's time over the native one; against a copy of "
        "as many bytes into new memory it is the share of its bandwidth. `benchmarks/cpu_kernels.py` measures them.",
        "",
        *table,
    ]


GUIDED = {
    "random": "`random`",
    "inverse_block": "`inverse_block`",
    "inverse_block_published_loop": "... as published, a loop on the host",
    "dispersion": "`dispersion`",
    "self_guided_solver": "`self_guided`: the solver alone, features given",
    "self_guided_cached": "`self_guided`: kept scores (with their refreshes)",
    "self_guided_early_layer": "`self_guided`: features of an early layer",
    "self_guided_fresh": "`self_guided`: features of the last layer",
    "self_guided_published_pca": "... as published, randomised PCA",
    "self_guided_published_eigh": "... as published, `eigh` of the batch",
    "self_guided_published_eigh_loop": "... as published, `eigh` clip by clip",
}


def masking() -> list[str]:
    """Return the table of what masks cost: of each recipe the largest batch."""
    lines = [json.loads(line) for line in (RESULTS / "masking.jsonl").read_text().splitlines()]
    rows = [row for row in lines if row["kind"] == "batch"]
    first: dict[str, Any] = rows[0]
    clips = max(row["clips"] for row in rows)
    found = {(row["strategy"], row["recipe"]): row for row in rows if row["clips"] == clips}
    recipes = {row["recipe"]: row["grid"] for row in rows}
    growth = {row["strategy"]: [] for row in lines if row["kind"] == "growth"}
    for row in (row for row in lines if row["kind"] == "growth"):
        growth[row["strategy"]].append((row["tokens"], row["median_ms"]))
    lengths = sorted(next(iter(growth.values())))
    head = [f"`{recipe}`, {grid}" for recipe, grid in recipes.items()]
    table = [
        f"| strategy | {' | '.join(head)} | {lengths[0][0]} to {lengths[-1][0]} tokens |",
        "| --- | " + "--- | " * len(head) + "--- |",
    ]
    for name, shown in GUIDED.items():
        cells = [_cost(found[name, recipe]) for recipe in recipes]
        times = sorted(growth.get(name, []))
        grown = f"{_short(times[0][1])} to {_short(times[-1][1])} ms" if times else ""
        table.append(f"| {shown} | {' | '.join(cells)} | {grown} |")
    step = [f"{found['training_step', recipe]['median_ms']:.0f} ms" for recipe in recipes]
    return [
        f"Time to draw the masks of {clips} clips, and its share of the recipe's whole training step, measured in the "
        f"same rounds (medians; size {first['size']}, {first['precision']}, {first['threads']} thread of "
        f"{first['device']}, {first['cpus']} cores, torch {first['torch']}, {first['date']}; load "
        f"{first['load'][0]:.1f} to {first['load'][1]:.1f}). On the right, how the time of "
        f"{_clips_of(lines)} clips of given features grows with their length. `benchmarks/masking.py` measures all of "
        "it. Shares of a base model's step on a GPU are not measured yet.",
        "",
        *table,
        f"| the training step | {' | '.join(step)} | |",
    ]


def _clips_of(lines: list[dict[str, Any]]) -> int:
    return next(int(row["clips"]) for row in lines if row["kind"] == "growth")


def _cost(row: dict[str, Any]) -> str:
    share = _percent(row["share_of_step"])
    if "share_of_step_with_refresh" in row:
        share += f" ({_percent(row['share_of_step_with_refresh'])})"
    return f"{_short(row['median_ms'])} ms, {share}"


def _percent(share: float) -> str:
    return f"{_short(100 * share)} %"


def _short(value: float) -> str:
    """Return two significant digits, without an exponent."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def masking_in_short() -> list[str]:
    """Return the shares of a training step, medians of the recipes at their largest batch, and the picture."""
    rows = [json.loads(line) for line in (RESULTS / "masking.jsonl").read_text().splitlines()]
    clips = max(row["clips"] for row in rows if row["kind"] == "batch")
    rows = [row for row in rows if row["kind"] == "batch" and row["clips"] == clips]
    shares = {
        (name, key): _percent(median(row[key] for row in rows if row["strategy"] == name and key in row))
        for name in GUIDED
        for key in ("share_of_step", "share_of_step_with_refresh")
        if any(row["strategy"] == name and key in row for row in rows)
    }
    of = {name: share for (name, key), share in shares.items() if key == "share_of_step"}
    kept = shares["self_guided_cached", "share_of_step_with_refresh"]
    return [
        f"What drawing the masks of {clips} clips costs, as a share of the whole training step (medians of four recipes "
        f"at size {rows[0]['size']} on one thread, {rows[0]['date']}): random {of['random']}, inverse block "
        f"{of['inverse_block']}, dispersion {of['dispersion']}; self-guided {of['self_guided_solver']} for the cut alone, "
        f"{kept} with kept scores and their refreshes, {of['self_guided_fresh']} with a pass of the encoder in every step, "
        f"{of['self_guided_published_eigh']} as published with `eigh`. The table, and which strategy when, is in "
        "[STRATEGIES.md](masktrain/masking/STRATEGIES.md).",
        "",
        "![Masking strategies as shares of a training step, and how they grow with the clip](benchmarks/results/cpu/masking.png)",
    ]


def evaluation() -> list[str]:
    """Return the table of what frozen encoders know: the last row of each case."""
    lines = (RESULTS / "evaluation.jsonl").read_text().splitlines()
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    earlier = []
    for row in map(json.loads, lines):
        case = (row["protocol"], row["task"], row["recipe"])
        if case in rows and case[0] == "layers" and _steps(rows[case]) != _steps(row):
            earlier.append(
                f"{row['recipe']} {row['task']} {_gap(rows[case]['above_untrained'])} after {_steps(rows[case])} steps"
            )
        rows[case] = row
    first = next(iter(rows.values()))
    table = [
        "| probe | task | recipe | steps | accuracy | untrained | log-mel | above untrained (95 %) | above log-mel (95 %) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (protocol, task, recipe), row in sorted(
        rows.items(), key=lambda item: (item[0][0] != "layers", item[0])
    ):
        means = " | ".join(f"{100 * row[name]['mean']:.1f}" for name in ("accuracy", "untrained", "logmel"))
        gaps = [_gap(row[f"above_{kind}"]) for kind in ("untrained", "logmel")]
        mark = "*" if row["pretraining"] == "transductive" else ""
        table.append(
            f"| {protocol} | {task}{mark} | {recipe} | {_steps(row)} | {means} | {' | '.join(gaps)} |"
        )
    minutes = [value for row in rows.values() for value in row["pretraining_minutes"]]
    return [
        f"Linear classifiers on frozen encoders of size `tiny`, pretrained {min(minutes):.0f} to {max(minutes):.0f} "
        f"minutes on one thread (beside other work) of {first['cpu']}, {first['cores']} cores, torch {first['packages']['torch']}, "
        f"{first['date']}: accuracy in %, {len(first['pretraining_seeds'])} pretraining seeds, each against one "
        "untrained encoder, in pairs over seeds and folds; the interval is the widest of those over pairs and over "
        'folds. "layers": learned sum of all layers, patches of a frame averaged; "evar": last layer, patches of a frame '
        "side by side. `benchmarks/evaluation.py` pretrains and measures; the rows hold every command, seed and score.",
        "",
        *table,
        "",
        "*: pretraining heard these clips, without labels (transductive)."
        + (f" Shorter runs, measured before, above untrained: {'; '.join(earlier)}." if earlier else ""),
        "",
        "![Accuracy of frozen encoders over the steps of pretraining](benchmarks/results/cpu/evaluation.png)",
    ]


def _steps(row: dict[str, Any]) -> str:
    """Return how many steps the encoders of an evaluation were pretrained."""
    words = row["commands"][0].split()
    return str(words[words.index("--steps") + 1])


def _gap(above: dict[str, Any]) -> str:
    ranges = [above[name] for name in ("pairs", "splits") if above[name]]
    widest = max(ranges, key=lambda one: one["high"] - one["low"])
    return f"{100 * widest['mean']:+.1f} ({100 * widest['low']:+.1f} to {100 * widest['high']:+.1f})"


def readme() -> list[str]:
    """Return the results that the README shows."""
    return [*learning(), "", *evaluation(), "", *steps(), "", *masking_in_short()]


SECTIONS = {
    ("README.md", "results"): readme,
    ("masktrain/masking/STRATEGIES.md", "costs"): masking,
    ("benchmarks/KERNELS.md", "kernels"): kernels,
}


def main() -> None:
    for (page, name), section in SECTIONS.items():
        path = REPO / page
        text = path.read_text()
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        wanted = "\n".join([f"{before}{begin}", *section(), f"{end}{after}"])
        if "--check" not in sys.argv:
            path.write_text(wanted)
        elif wanted != text:
            sys.exit(f"{page} does not show what benchmarks/results hold; run this script.")


if __name__ == "__main__":
    main()
