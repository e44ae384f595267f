# SPDX-License-Identifier: Apache-2.0
"""A wheel installed elsewhere works: built from the checkout, installed into a fresh environment, run from a folder
that holds nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import runs

REPO = Path(__file__).resolve().parent.parent


def call(*command: str | Path, cwd: Path, **variables: str) -> str:
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "MASKTRAIN", "VIRTUAL_ENV"))
    } | variables
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow(
    covers=["pyproject.toml", "CMakeLists.txt", "csrc", "masktrain/__init__.py", "kernels/_native.py"]
)
@pytest.mark.timeout(1200)
def test_a_wheel_installed_elsewhere_trains(tmp_path: Path) -> None:
    call(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path / "wheel", REPO, cwd=tmp_path
    )
    (wheel,) = (tmp_path / "wheel").iterdir()
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert [n for n in names if n.endswith("libmasktrain_cpu.so")]
    assert "masktrain/kernels/philox/reference.py" in names
    assert not [n for n in names if n.startswith(("tests/", "kernels/", "csrc/", "benchmarks/"))]
    call(sys.executable, "-m", "venv", tmp_path / "venv", cwd=tmp_path)
    call(tmp_path / "venv" / "bin" / "pip", "install", "-q", wheel, cwd=tmp_path)
    command = tmp_path / "venv" / "bin" / "masktrain"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    call(command, "doctor", "--json", elsewhere / "doctor.json", cwd=elsewhere)
    doctor = json.loads((elsewhere / "doctor.json").read_text())
    assert "libmasktrain_cpu.so" in doctor["machine"]["native library"]
    dali = next(row for row in doctor["packages"] if row["package"].startswith("nvidia-dali"))
    assert dali["status"] == "missing" and dali["instead"]
    options = runs.SMALL[: runs.SMALL.index("--device")]
    call(
        command, "run", "--recipe", "mae_ast_patch", *options, "--steps", "4", "--out", "run",
        cwd=elsewhere, XDG_CACHE_HOME=str(tmp_path / "cache"),
    )  # fmt: skip
    kernels = json.loads((elsewhere / "run" / "env.json").read_text())["kernels"]
    assert kernels["dropout"]["serves"] == "native"
    assert json.loads((elsewhere / "run" / "summary.json").read_text())["complete"]
