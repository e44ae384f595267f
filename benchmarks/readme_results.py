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
    return "\n".join([*real_audio(), "", *kernels()])


def real_audio() -> list[str]:
    """Return the lines about the run on real audio."""
    folder = RESULTS / "real_audio"
    summary = json.loads((folder / "summary.json").read_text())
    machine = json.loads((folder / "machine.json").read_text())
    last = summary["validation"][-1]
    lower = 100 * (1 - summary["loss_last"] / summary["loss_first"])
    return [
        f"MAE-AST `tiny` on ESC-10 (44.1 kHz Ogg, 5 s) and FSDD (8 kHz WAV, 0.1 to 2.3 s) together, "
        f"{summary['steps']} steps on {machine['cpu']}, {machine['cores']} cores, torch {machine['packages']['torch']}, "
        f"{machine['date']}:",
        "",
        f"    {machine['command']}",
        "",
        f"The loss falls from {summary['loss_first']:.2f} (steps 2 to 6) to {summary['loss_last']:.2f} (last tenth), "
        f"{lower:.0f} % lower; predicting the mean of each mel bin gives {summary['loss_baseline']:.2f}. On held-out "
        f"clips the squared error of masked cells ends at {last['parts']['mse']:.3f}, that of the per-bin mean is "
        f"{last['baseline_parts']['mse']:.3f}.",
        "",
        "![Loss](benchmarks/results/cpu/real_audio/loss.png)",
        "",
        "![Held-out clips: input, what the model saw, reconstruction]"
        "(benchmarks/results/cpu/real_audio/reconstruction.png)",
    ]


def kernels() -> list[str]:
    """Return the table of the native ops: medians of interleaved rounds, as ratios."""
    rows = [json.loads(line) for line in (RESULTS / "kernels.jsonl").read_text().splitlines()]
    table = ["| op | case | native, ms | against | ratio |", "| --- | --- | --- | --- | --- |"]
    for native in rows:
        if native["provider"] != "native":
            continue
        for other in rows:
            same = all(other[name] == native[name] for name in ("op", "size", "threads"))
            # the reference is the definition, not a rival; copies are ceilings, kept in the rows
            if same and other["provider"] not in ("native", "reference") and "copy" not in other["provider"]:
                ratio = other["median_ms"] / native["median_ms"]
                case = ", ".join(f"{name} {value}" for name, value in native["size"].items())
                table.append(
                    f"| {native['op']} | {case} | {native['median_ms']:.3g} | {other['provider']} | {ratio:.1f}x |"
                )
    first: dict[str, Any] = rows[0]
    loads = [row["load_before"] for row in rows]
    return [
        f"Native CPU ops, one thread, medians of {first['rounds']} interleaved rounds on {first['machine']}, "
        f"{first['cores']} cores, {first['instruction_set']}, torch {first['torch']}, {first['date']}; other work was "
        f"running (load {min(loads):.1f} to {max(loads):.1f}). The ratio is the other's time over the native one; "
        "`benchmarks/cpu_kernels.py` measures them.",
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
