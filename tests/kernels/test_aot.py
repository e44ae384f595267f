# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for every architecture, and spills and shared memory are no worse than recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import aot
import pytest

from masktrain.kernels import _triton

pytestmark = pytest.mark.skipif(_triton.MISSING is not None, reason=str(_triton.MISSING))

REPO = Path(__file__).resolve().parent.parent.parent


def compiled(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests/support/aot.py in a process in which Triton compiles instead of interpreting."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(REPO), env.get("PYTHONPATH", "")])
    command = [sys.executable, aot.__file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False)


def complaints(rows: list[dict], recorded: dict[str, dict[str, int]]) -> list[str]:
    """Return what is worse than recorded, or not recorded, or beyond the hardware."""
    found = []
    for row in rows:
        name, before = row["kernel"], recorded.get(row["kernel"])
        limit = aot.SHARED_LIMIT[int(name.rsplit("sm_", 1)[1])]
        if row["shared"] > limit:
            found.append(f"{name}: {row['shared']} bytes of shared memory, the GPU has {limit}")
        if before is None:
            found.append(f"{name}: not in the baseline")
            continue
        found += [
            f"{name}: {what} is {row[what]} bytes, recorded is {before[what]}"
            for what in ("spill", "shared")
            if row[what] > before[what]
        ]
    return found


def test_every_triton_module_has_cases() -> None:
    ops = {path.parent.name for path in (REPO / "kernels").glob("*/_triton.py")}
    assert ops == {path.stem for path in aot.case_files()}


@pytest.mark.parametrize("op", [path.stem for path in aot.case_files()])
def test_compiles_within_the_baseline(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    baseline = aot.baseline_path()
    if not baseline.exists():
        pytest.skip(
            f"no {baseline.name}; record one with `python {Path(aot.__file__).relative_to(REPO)} --write`"
        )
    done = compiled("--op", op)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    with capsys.disabled():
        for row in rows:
            print(f"\n{row['kernel']:70} {row['registers']:4} registers {row['spill']:6} B spilled", end="")
    recorded = json.loads(baseline.read_text()).get(op, {})
    assert not complaints(rows, recorded)
    assert set(recorded) == {row["kernel"] for row in rows}, "record the baseline again: kernels went"


def test_the_gate_can_fail() -> None:
    row = {"kernel": "op[case].kernel.sm_89", "registers": 255, "spill": 8, "shared": 1024}
    same = {row["kernel"]: {"spill": 8, "shared": 1024}}
    assert complaints([row], same) == []
    assert "not in the baseline" in complaints([row], {})[0]
    assert "spill is 9 bytes, recorded is 8" in complaints([row | {"spill": 9}], same)[0]
    assert "shared is 1025 bytes" in complaints([row | {"shared": 1025}], same)[0]
    assert "the GPU has 101376" in complaints([row | {"shared": 102400}], same)[0]
