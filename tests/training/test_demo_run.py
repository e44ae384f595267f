# SPDX-License-Identifier: Apache-2.0
"""The first command of the README: without data and without a GPU it trains, learns and leaves everything behind."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import runs
import torch


def run_demo(tmp_path: Path, *arguments: str, **variables: str) -> Path:
    """Run the demo in an empty folder with a cache of its own and return the run's folder."""
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **variables}
    command = [*runs.COMMAND, "run", "--recipe", "mae_ast_frame", "--device", "cpu", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "No --data" in done.stdout.splitlines()[0]
    assert "size tiny" in done.stdout
    (run,) = (tmp_path / "runs").iterdir()
    return run


def check_demo(run: Path, least_steps: int) -> None:
    summary = json.loads((run / "summary.json").read_text())
    rows = runs.rows(run)
    assert summary["complete"] and summary["steps"] == len(rows) >= least_steps
    first = [r["loss"] for r in rows if 2 <= r["step"] <= 6]
    last = [r["loss"] for r in rows if r["step"] > len(rows) - len(rows) // 10]
    assert summary["loss_first"] == pytest.approx(math.fsum(first) / 5)
    assert summary["loss_last"] == pytest.approx(math.fsum(last) / len(last))
    assert summary["loss_last"] < 0.8 * summary["loss_first"]
    assert summary["loss_last"] < summary["loss_baseline"]
    assert summary["last_mse"] < summary["baseline_mse"]
    assert summary["error"] < summary["error_bin_mean"]
    for name in ("config.json", "env.json", "metrics.jsonl", "validation.jsonl"):
        assert (run / name).stat().st_size > 0
    drawn = sorted(p.name for p in (run / "pictures").iterdir())
    middle = (len(rows) + 1) // 2
    pictures = [f"reconstruction_{step:08d}.png" for step in (0, middle, len(rows))]
    assert drawn == sorted(["error.png", "loss.png", "mask_rate.png", "throughput.png", *pictures])
    assert list((run / "tb").iterdir())
    newest = sorted((run / "checkpoints").iterdir())[-1]
    assert newest.name == f"step_{len(rows):08d}"
    for row in rows:
        assert {"step", "loss", "loss_mse", "loss_info_nce", "lr", "grad_norm", "clips_per_s"} <= row.keys()


@pytest.mark.timeout(400)
def test_the_demo_learns(tmp_path: Path) -> None:
    check_demo(run_demo(tmp_path, "--steps", "200", "--seed", "0"), least_steps=200)


@pytest.mark.slow(covers=["masktrain", "kernels", "csrc"])
@pytest.mark.timeout(1000)
def test_the_demo_as_it_stands(tmp_path: Path) -> None:
    check_demo(run_demo(tmp_path), least_steps=60)


def test_without_native_library_dali_and_triton(tmp_path: Path) -> None:
    """What is missing is passed over: the run goes on with the reference forms and soundfile."""
    blocker = tmp_path / "blocked"
    for package in ("nvidia", "triton"):
        (blocker / package).mkdir(parents=True)
        (blocker / package / "__init__.py").write_text("raise ImportError('not installed here')")
    path = os.pathsep.join([str(blocker), *filter(None, [os.environ.get("PYTHONPATH")])])
    (tmp_path / "empty").mkdir()
    run = run_demo(
        tmp_path,
        *runs.SMALL[: runs.SMALL.index("--device")],
        "--steps",
        "3",
        PYTHONPATH=path,
        MASKTRAIN_LIB_DIR=str(tmp_path / "empty"),
    )
    kernels = json.loads((run / "env.json").read_text())["kernels"]
    assert kernels["dropout"]["serves"] == kernels["philox_words"]["serves"] == "reference"
    assert "native" in kernels["dropout"]["passed_over"]


def test_reference_and_native_kernels_train_alike(tmp_path: Path) -> None:
    """The same words, masks and dropout bits from either implementation: the losses differ by rounding alone."""
    clips = runs.make_clips(tmp_path / "audio", 24)
    losses = {}
    for name in ("native", "reference"):
        arguments = ["run", "--recipe", "mae_ast_patch", *runs.SMALL, "--steps", "4", "--data", str(clips)]
        env = {**runs.environment(), "MASKTRAIN_KERNELS": name}
        command = [*runs.COMMAND, *arguments, "--out", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        rows = runs.rows(tmp_path / name)
        losses[name] = torch.tensor([r["loss"] for r in rows], dtype=torch.float64)
        serves = json.loads((tmp_path / name / "env.json").read_text())["kernels"]
        assert serves["dropout"]["serves"] == name
    torch.testing.assert_close(losses["native"], losses["reference"], rtol=1e-4, atol=0)
