# SPDX-License-Identifier: Apache-2.0
"""Does each recipe learn? Trains its `tiny` size on the CPU and compares held-out clips with predictors that do not.

python benchmarks/learning.py --data esc10.csv --data fsdd.csv                       # every recipe of STEPS
python benchmarks/learning.py --data ... --recipe maskspec --steps 800               # one of them
python benchmarks/learning.py --draw                                                 # the figure alone, from the data

Each run appends a row to `learning.jsonl` and replaces its curve in `learning/`; the figure is drawn from the curves.
OMP_NUM_THREADS is the number of threads of a run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from masktrain.recipes import find
from masktrain.training import pictures
from masktrain.training.drawing import save
from masktrain.training.run_dir import cpu_model

RESULTS = Path(__file__).resolve().parent / "results" / "cpu"
ROWS, FOLDER = RESULTS / "learning.jsonl", RESULTS / "learning"
# two to nine minutes each on one core of a busy machine, but for the frame recipes: between visible frames of 20 ms
# linear interpolation is a strong predictor, which takes half an hour and more to pass
STEPS = {
    "mae_ast_frame": 24000,
    "mae_ast_patch": 800,
    "ssast_frame": 12000,
    "ssast_patch": 400,
    "maskspec": 1000,
    "msm_mae": 1000,
    "msm_mae_orig": 400,
    "audiomae": 1000,
}
# beside the recipe as it is: in so short a run, and on 3400 clips, what dropout costs in precision it does not pay back,
# and SSAST's learned positions have to be met often, which crops of 1.5 s see to
OPTIONS = {
    "mae_ast_frame": "--model.dropout 0 --model.attention-dropout 0 --model.dropout-input 0 --model.encoder-layerdrop 0 "
    "--optim.lr 1e-3",
    "ssast_frame": "--model.passes 1 --data.clip-seconds 1.5 --batch-size 16 --optim.lr 7e-4 --schedule.kind cosine "
    "--schedule.warmup-steps 8000",
}
EVALUATIONS = 20
HELD_OUT = 128
PICTURES = ("mae_ast_frame", "maskspec")  # whose reconstructions are kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, action="append", default=[], help="as of masktrain run")
    parser.add_argument("--recipe", action="append", choices=list(STEPS), help="default: all")
    parser.add_argument("--steps", type=int, help="default: those of STEPS")
    parser.add_argument("--draw", action="store_true", help="draw the figure and run nothing")
    arguments = parser.parse_args()
    if not arguments.draw:
        if not arguments.data:
            parser.error("--data: name the clips to train on")
        for recipe in arguments.recipe or STEPS:
            measure(recipe, arguments.steps or STEPS[recipe], arguments.data)
    draw()


def options(recipe: str, steps: int) -> list[str]:
    """Return the options of `masktrain run` but for the data."""
    chosen = ["--recipe", recipe, "--size", "tiny", "--steps", str(steps), "--device", "cpu"]
    every = find(recipe, "tiny").schedule.total_steps // EVALUATIONS  # published steps, which scale
    chosen += ["--train.validation-clips", str(HELD_OUT), "--schedule.evaluate-every", str(every)]
    return chosen + OPTIONS.get(recipe, "").split()


def measure(recipe: str, steps: int, data: list[Path]) -> None:
    """Run a recipe, append its row and write its curve."""
    chosen = options(recipe, steps)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-c", "from masktrain.cli import main; main()", "run", *chosen]
        subprocess.run(
            [*command, *(text for path in data for text in ("--data", str(path))), "--out", str(run)],
            check=True,
        )
        summary = json.loads((run / "summary.json").read_text())
        environment = json.loads((run / "env.json").read_text())
        batch_size = json.loads((run / "config.json").read_text())["recipe"]["batch_size"]
        FOLDER.mkdir(parents=True, exist_ok=True)
        if recipe in PICTURES:
            last = max((run / "pictures").glob("reconstruction_*.png"))
            shutil.copyfile(last, FOLDER / f"{recipe}.png")
    evaluations = summary["validation"]
    curve = {"recipe": recipe, "size": "tiny", "evaluations": evaluations}
    (FOLDER / f"{recipe}.json").write_text(json.dumps(curve, indent=1) + "\n")
    objective = find(recipe, "tiny").objective
    row: dict[str, Any] = {
        "recipe": recipe,
        "size": "tiny",
        "command": " ".join(["masktrain run", *chosen, *(f"--data {path.name}" for path in data)]),
        "steps": summary["steps"],
        "batch_size": batch_size,
        "seconds": round(summary["seconds"], 1),
        "validation_seconds": round(summary["validation_seconds"], 1),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "load_before": round(load, 1),
        "loss_first": summary["loss_first"],
        "loss_last": summary["loss_last"],
        "norm_pix_loss": getattr(objective, "norm_pix_loss", False),
        "error_untrained": evaluations[0]["error"],
        "error": summary["error"],
        "error_bin_mean": summary["error_bin_mean"],
        "error_interpolation": summary["error_interpolation"],
        "of_bin_mean": summary["error"] / summary["error_bin_mean"],
        "of_interpolation": summary["error"] / summary["error_interpolation"],
        "mse": evaluations[-1]["parts"]["mse"],
        "mse_bin_mean": evaluations[-1]["baseline_parts"]["mse"],
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "packages": environment["packages"],
        "kernels": {op: choice["serves"] for op, choice in environment["kernels"].items()},
        "commit": environment["commit"],
        "date": date.today().isoformat(),
    }
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def draw() -> None:
    """Draw the curves of all recipes, in the order of STEPS, into one figure."""
    runs = {}
    for recipe in STEPS:
        if (FOLDER / f"{recipe}.json").exists():
            curve = json.loads((FOLDER / f"{recipe}.json").read_text())
            runs[recipe] = [pictures.Validation(**evaluation) for evaluation in curve["evaluations"]]
    title = "Error of masked cells on held-out clips"
    save(pictures.error_figure(runs, title), FOLDER / "error.png")


if __name__ == "__main__":
    main()
