# SPDX-License-Identifier: Apache-2.0
"""Does pretraining help? Pretrains recipes at size `tiny` on a CPU and probes the frozen encoders on ESC-10 and FSDD.

python benchmarks/evaluation.py --data FOLDER --runs FOLDER      # pretrain what is missing in --runs, then probe all
python benchmarks/evaluation.py --draw                           # the figure alone, from the data

--data holds esc10.csv (path, label, fold) and fsdd.csv (path, digit, speaker, split). Pretraining hears all of ESC-10,
without labels, and the training part of FSDD: rows on ESC-10 are transductive and say so, rows on FSDD are inductive.

Two protocols, fixed beforehand. "layers": a learned weighted sum of all encoder layers, patches of a frame averaged (as
SSAST, MAE-AST and AudioMAE pool them). "evar": the last layer, patches of a frame side by side (as
nttcslab/eval-audio-repr has M2D). In both each classifier takes that learning rate of RATES which is best on its own
validation part, never on test clips. The untrained encoder has the same config, front end and input statistics, and
weights drawn anew; the log-mel baseline is mean and deviation over time of each mel bin.

Rows go to `evaluation.jsonl`, one for each recipe, task and protocol, with the accuracy over the steps of pretraining.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masktrain.evaluation.intervals import paired, t_interval
from masktrain.evaluation.labels import LabelledSet, read_labelled
from masktrain.evaluation.linear import Against, LinearConfig, evaluate_linear
from masktrain.evaluation.report_pictures import accuracy_figure
from masktrain.training.drawing import save
from masktrain.training.run_dir import cpu_model

RESULTS = Path(__file__).resolve().parent / "results" / "cpu"
ROWS, FIGURE = RESULTS / "evaluation.jsonl", RESULTS / "evaluation.png"
# half an hour each for MAE-AST and 20 minutes for maskspec, on one thread beside other work; the rows have the minutes
STEPS = {"mae_ast_frame": 12000, "mae_ast_patch": 12000, "maskspec": 3000}
SEEDS = (0, 1, 2)
TASKS = {"ESC-10": ("esc10.csv", "label"), "FSDD digit": ("fsdd.csv", "digit")}
RATES = (3e-4, 3e-3)
PROTOCOLS = {
    "layers": LinearConfig(head="weighted", pool="mean", seeds=3, lrs=RATES),
    "evar": LinearConfig(head="last", pool="concat", seeds=3, lrs=RATES),
}
CURVE = ("layers", 1)  # protocol and classifiers of a point of the curve over the steps
SAVED = 10  # checkpoints of a run; every second one is a point of the curve


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of esc10.csv and fsdd.csv")
    parser.add_argument(
        "--runs", type=Path, help="folder of the pretraining runs, made where they are missing"
    )
    parser.add_argument("--recipe", action="append", choices=list(STEPS), help="default: all")
    parser.add_argument("--draw", action="store_true", help="draw the figure and run nothing")
    arguments = parser.parse_args()
    if not arguments.draw:
        if not arguments.data or not arguments.runs:
            parser.error("--data and --runs: name the audio and a folder for the pretraining runs")
        for recipe in arguments.recipe or STEPS:
            folders = [pretrain(recipe, seed, arguments.data, arguments.runs) for seed in SEEDS]
            for task in TASKS:
                measure(recipe, task, folders, arguments.data, arguments.runs / "features")
    draw()


def options(recipe: str, seed: int) -> list[str]:
    """Return the options of `masktrain run` but for data and folder."""
    steps = STEPS[recipe]
    line = f"--recipe {recipe} --size tiny --device cpu --steps {steps} --seed {seed}"
    return f"{line} --train.checkpoint-every {steps // SAVED} --train.keep-last 100".split()


def pretrain(recipe: str, seed: int, data: Path, runs: Path) -> Path:
    """Return the run's folder, after the run if it was not there, or the rest of it if it was cut off."""
    folder = runs / f"{recipe}_s{seed}"
    masktrain = [sys.executable, "-c", "from masktrain.cli import main; main()", "run"]
    if (folder / "checkpoints").is_dir() and not (folder / "summary.json").is_file():
        subprocess.run([*masktrain, "--resume", str(folder)], check=True)
    elif not (folder / "summary.json").is_file():
        runs.mkdir(parents=True, exist_ok=True)
        manifest = runs / "pretrain.csv"
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path"])
            for name, _ in TASKS.values():
                for row in csv.DictReader((data / name).open()):
                    if row.get("split") != "test":
                        writer.writerow([str((data / row["path"]).resolve())])
        where = ["--data", str(manifest), "--out", str(folder)]
        subprocess.run([*masktrain, *options(recipe, seed), *where], check=True)
    return folder


def measure(recipe: str, task: str, folders: list[Path], data: Path, cache: Path) -> None:
    """Probe the runs of a recipe on one task by every protocol, and append the rows."""
    name, label = TASKS[task]
    labelled = read_labelled(data / name, label=label, fold=None, split=None, task=None)
    logmel: list[list[float]] | None = None
    for protocol, config in PROTOCOLS.items():
        reports = []
        for folder in folders:
            # what no pretraining has touched is measured once, beside the first run
            against: tuple[Against, ...] = () if reports else ("untrained", "logmel")
            if logmel is not None:
                against = against[:1]
            report = evaluate_linear(
                [folder], labelled, config, against=against, device=torch.device("cpu"), cache=cache
            )
            reports.append(report)
        others = reports[0]["encoders"][0]["against"]
        logmel = others["logmel"]["scores"] if logmel is None else logmel
        row = _row(recipe, task, protocol, reports, logmel)
        if protocol == CURVE[0]:
            row["curve"] = curve(folders, labelled, config, cache)
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {key: round(row[key]["mean"], 4) for key in ("accuracy", "untrained", "logmel")}
        print(recipe, task, protocol, shown, row["above_untrained"], flush=True)


def curve(
    folders: list[Path], labelled: LabelledSet, config: LinearConfig, cache: Path
) -> list[dict[str, Any]]:
    """Return the accuracy of every second checkpoint, step by step: of each run the mean over splits."""
    once = replace(config, seeds=CURVE[1])
    points: dict[int, list[float]] = {}
    for folder in folders:
        for path in sorted((folder / "checkpoints").glob("step_*"))[1::2]:
            report = evaluate_linear([path], labelled, once, device=torch.device("cpu"), cache=cache)
            row = report["encoders"][0]
            points.setdefault(row["step"], []).append(row["mean"])
    return [{"step": step, "accuracy": values} for step, values in sorted(points.items())]


def _row(
    recipe: str, task: str, protocol: str, reports: list[dict[str, Any]], logmel: list[list[float]]
) -> dict[str, Any]:
    encoders = [report["encoders"][0] for report in reports]
    # a run counts once, by the mean of its classifiers, and meets one untrained encoder: no pair shares a side with another
    ours = np.stack([np.mean(row["scores"], axis=0) for row in encoders])
    untrained = np.array(encoders[0]["against"]["untrained"]["scores"])
    baseline = np.array(logmel)
    config = PROTOCOLS[protocol]
    environment = json.loads((Path(encoders[0]["checkpoint"]) / "env.json").read_text())
    gaps = {
        "untrained": paired(ours, untrained),
        "logmel": paired(ours, baseline),
    }
    return {
        "recipe": recipe,
        "size": "tiny",
        "task": task,
        "protocol": protocol,
        "head": config.head,
        "pool": config.pool,
        "lr": list(config.lrs),
        "commands": [
            " ".join(["masktrain run", *options(recipe, seed), "--data pretrain.csv"]) for seed in SEEDS
        ],
        "pretraining_seeds": list(SEEDS),
        "probe_seeds": reports[0]["seeds"],
        "pretraining_minutes": [
            round(json.loads((Path(row["checkpoint"]) / "summary.json").read_text())["seconds"] / 60, 1)
            for row in encoders
        ],
        "pretraining": encoders[0]["pretraining"]["state"],
        "accuracy": asdict(t_interval(ours.mean(1))),
        "untrained": asdict(t_interval(untrained.mean(1))),
        "logmel": asdict(t_interval(baseline.mean(1))),
        **{
            f"above_{kind}": {
                "pairs": asdict(gap.pairs),
                "splits": asdict(gap.splits) if gap.splits else None,
                "excludes_zero": gap.excludes_zero,
            }
            for kind, gap in gaps.items()
        },
        "scores": ours.tolist(),
        "scores_untrained": untrained.tolist(),
        "scores_logmel": baseline.tolist(),
        "threads": torch.get_num_threads(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "packages": environment["packages"],
        "commit": environment["commit"],
        "date": date.today().isoformat(),
    }


def draw() -> None:
    """Draw the accuracy over the steps of pretraining, a panel for each task, from the last row of each case."""
    rows = {(row["task"], row["recipe"], row["protocol"]): row for row in map(json.loads, ROWS.open())}
    curves = [row for (_, _, protocol), row in rows.items() if protocol == CURVE[0]]
    title = "Linear accuracy of frozen encoders (dashed: log-mel)"
    save(accuracy_figure(curves, title), FIGURE)


if __name__ == "__main__":
    main()
