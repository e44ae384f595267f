# SPDX-License-Identifier: Apache-2.0
"""Writes the measured results of the README from the rows under benchmarks/results.

python benchmarks/readme_results.py            # rewrite the section
python benchmarks/readme_results.py --check    # exit 1 if it is not what the rows say
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
README = REPO / "README.md"
RESULTS = REPO / "benchmarks" / "results" / "cpu"
BEGIN, END = "<!-- results: benchmarks/readme_results.py -->", "<!-- end of results -->"


def section() -> str:
    """Return the section between the markers."""
    return "\n".join([*learning(), "", *steps(), "", *kernels()])


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
        "between the visible frames of the clip. `benchmarks/learning.py` measures it:",
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


def main() -> None:
    text = README.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}\n{section()}\n{END}{after}"
    if "--check" in sys.argv:
        sys.exit(
            0 if wanted == text else "README.md does not show what benchmarks/results hold; run this script."
        )
    README.write_text(wanted)


if __name__ == "__main__":
    main()
