# SPDX-License-Identifier: Apache-2.0
"""The GPU suite's rehearsal: every check runs, on a machine that has only torch, Triton and numpy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from masktrain.recipes import RECIPES, distinct, find
from masktrain.training.op_cases import OPS, REPRESENTATIVES, implementations, representative_ops

REPO = Path(__file__).resolve().parents[1]
SUITE = REPO / "benchmarks" / "gpu_suite.py"
# What else a full installation brings.
ABSENT = (
    "tyro",
    "rich",
    "safetensors",
    "soundfile",
    "tensorboard",
    "matplotlib",
    "scipy",
    "nvidia",
    "hypothesis",
)
BARE = f"""
import runpy, sys
from importlib.abc import MetaPathFinder
import torch  # what torch itself finds is its own affair
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(f"no module {{name}}", name=name)
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in {ABSENT!r} else real(name, package)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(SUITE.parent)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# What only a GPU can answer.
NEEDS_GPU = {"property captured draw"} | {f"property no host sync {name}" for name in distinct()}


def run(*arguments: str | Path, bare: bool = False, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", BARE] if bare else []), str(SUITE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def rows(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton's interpreter")
@pytest.mark.slow(covers=["benchmarks", "kernels", "masktrain/training", "masktrain/models"])
@pytest.mark.timeout(900)
def test_rehearsal_runs_every_check(tmp_path: Path) -> None:
    named = run("--device", "cpu", "--list", bare=True).stdout.split("\n")
    wanted = {name for name in named if name}
    assert len(wanted) > 100
    done = run("--device", "cpu", "--out", tmp_path, bare=True, timeout=850)
    found = rows(tmp_path)
    bad = [row for row in found if row["status"] not in ("ok", "cannot run")]
    assert not bad, bad
    assert done.returncode == 0, done.stderr
    assert {row["check"] for row in found} == wanted
    unable = {row["check"] for row in found if row["status"] == "cannot run"}
    assert unable - {"golden", "build native", "build cuda"} == NEEDS_GPU
    assert all(row["question"] and row["seconds"] is not None for row in found)


def test_no_row_is_missing() -> None:
    """A step of each recipe in both batches, of distinct ones eager, compiled and by each attention; every op."""
    names = set(run("--device", "cpu", "--list").stdout.splitlines())
    for batch in (64, 512):
        assert {f"step {name} {batch} published" for name in RECIPES} <= names
        for form in ("native attention", "triton attention", "native attention, compiled"):
            assert {f"step {name} {batch} no attention dropout, {form}" for name in distinct()} <= names
    assert {f"bench {op}" for op in OPS} <= names
    assert {f"bench masking {name}" for name in ("mae_ast_patch", "maskspec", "msm_mae", "audiomae")} <= names
    assert {f"property step equals the CPU {name}" for name in distinct()} <= names
    for name in REPRESENTATIVES:
        rows_of = {row for row in names if row.startswith("verify") and row.endswith(f" {name} tiny")}
        for op in representative_ops(find(name, "tiny")):
            has_kernel = any(i.name == "triton" for i in implementations(op))
            assert any(row.split()[1:3] == [op, "triton"] for row in rows_of) == has_kernel, (name, op)


def test_resume_leaves_out_what_is_done_and_time_over_is_said(tmp_path: Path) -> None:
    only = ("--device", "cpu", "--only", "machine", "--only", "property mask plans", "--out", tmp_path)
    over = run(*only, "--seconds", "-1")
    assert over.returncode == 0, over.stderr
    assert {row["status"] for row in rows(tmp_path)} == {"no time"}
    assert run(*only, "--resume").returncode == 0
    first = rows(tmp_path)
    assert {row["check"]: row["status"] for row in first} == {"machine": "ok", "property mask plans": "ok"}
    assert run(*only, "--resume").returncode == 0
    assert rows(tmp_path) == first


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(SUITE.parent))
    from suite import harness

    return harness


def test_a_check_that_fails_stops_no_other(harness, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import torch

    def raises(error: Exception):  # type: ignore[no-untyped-def]
        def check() -> dict[str, object]:
            raise error

        return check

    answers = {
        "error": raises(KeyError("x")),
        "wrong": raises(AssertionError("no")),
        "cannot run": raises(harness.CannotRun("why")),
        "ok": lambda: [{"a": 1}, {"a": 2}],
    }
    checks = [harness.Check(name, "?", answer) for name, answer in answers.items()]
    results = harness.Results(tmp_path / "results.jsonl", resume=False)
    harness.run(checks, results, torch.device("cpu"), float("inf"))
    assert [(r["check"], r["status"]) for r in rows(tmp_path)] == [
        (name, name) for name in ("error", "wrong", "cannot run", "ok", "ok")
    ]


def test_busy_time_counts_what_overlaps_once(harness) -> None:  # type: ignore[no-untyped-def]
    from suite.steps import covered

    assert covered([(0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (5.0, 6.0)]) == 4.0
