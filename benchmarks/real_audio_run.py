# SPDX-License-Identifier: Apache-2.0
"""Trains on real audio and keeps what the README shows of it: rows, summary, curve, reconstruction.

python benchmarks/real_audio_run.py --out benchmarks/results/cpu/real_audio -- COMMAND OPTIONS OF `masktrain run`
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

from masktrain.training.run_dir import cpu_model

KEPT = ("metrics.jsonl", "validation.jsonl", "summary.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("run", nargs=argparse.REMAINDER, help="options of masktrain run")
    arguments = parser.parse_args()
    options = [o for o in arguments.run if o != "--"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable,
            "-c",
            "from masktrain.cli import main; main()",
            "run",
            *options,
            "--out",
            str(run),
        ]
        subprocess.run(command, check=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copyfile(run / name, arguments.out / name)
        environment = json.loads((run / "env.json").read_text())
        machine = {
            "command": " ".join(["masktrain run", *options]),
            "date": date.today().isoformat(),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "commit": environment["commit"],
            "packages": environment["packages"],
            "kernels": {op: choice["serves"] for op, choice in environment["kernels"].items()},
        }
        (arguments.out / "machine.json").write_text(json.dumps(machine, indent=1) + "\n")
        last = max((run / "pictures").glob("reconstruction_*.png"))
        shutil.copyfile(last, arguments.out / "reconstruction.png")
        shutil.copyfile(run / "pictures" / "loss.png", arguments.out / "loss.png")


if __name__ == "__main__":
    main()
