# SPDX-License-Identifier: Apache-2.0
"""What does each masking strategy cost, ours and as published, beside a training step? Writes the rows and the picture.

python benchmarks/masking.py --threads 1          # every grid and batch size: some minutes on a CPU
python benchmarks/masking.py --draw               # the picture alone, from the rows

It measures what `masktrain bench masking` measures, and replaces `masking.jsonl` and `masking.png` in the folder of
the results: one line for each strategy, recipe and batch size, and for each length of the growth with the clip.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from masktrain.recipes import find
from masktrain.training import masking_bench
from masktrain.training.drawing import save
from masktrain.training.masking_bench.picture import cost_figure
from masktrain.training.masking_bench.rows import GRIDS, batch_sizes, exponents
from masktrain.training.measure import Stopwatch

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = {"cpu": "tiny", "cuda": "base"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=4.0, help="for each recipe and batch size")
    parser.add_argument("--out", type=Path, help="folder; default: benchmarks/results/cpu or gpu")
    parser.add_argument("--draw", action="store_true", help="draw the picture and measure nothing")
    arguments = parser.parse_args()
    folder = arguments.out or RESULTS / {"cpu": "cpu", "cuda": "gpu"}[arguments.device]
    path = folder / "masking.jsonl"
    if not arguments.draw:
        lines = measure(torch.device(arguments.device), arguments.threads, arguments.seconds)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    save(cost_figure(report_of(path)), folder / "masking.png")


def measure(device: torch.device, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Return the lines: kind ("batch" or "growth"), the fields of a row, and what it was measured with."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    size = SIZES[device.type]
    recipes = [(grid, find(name, size)) for grid in GRIDS.values() for name in grid.recipes]
    report = masking_bench.run(
        recipes, Stopwatch(device), batch_sizes(device), seconds, scale=True, said=print
    )
    common = {**report["made_with"], "load": [round(load, 2), round(os.getloadavg()[0], 2)]}
    kinds = (("batch", report["rows"]), ("growth", report["scaling"]))
    return [{"kind": kind, **row, **common} for kind, rows in kinds for row in rows]


def report_of(path: Path) -> dict[str, Any]:
    """Return the report whose lines a file holds, as `masktrain bench masking --json` writes it."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    growth = [line for line in lines if line["kind"] == "growth"]
    rows = [line for line in lines if line["kind"] == "batch"]
    return {"made_with": lines[0], "rows": rows, "scaling": growth, "exponents": exponents(growth)}


if __name__ == "__main__":
    main()
