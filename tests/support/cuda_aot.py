# SPDX-License-Identifier: Apache-2.0
"""Compiles csrc/cuda with nvcc for GPUs that are not there, and reads registers, spills and shared memory.

    python tests/support/cuda_aot.py [--write]

prints a row per kernel and architecture; --write records spill bytes and shared memory in
tests/kernels/aot/nvcc_VERSION.json.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("75", "80", "86", "89", "90a")
# As CMakeLists.txt compiles them.
OPTIONS = ("-std=c++17", "-O3", f"-I{REPO / 'csrc' / 'include'}")


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one architecture. spill: bytes of spill stores and loads; shared: static bytes."""

    kernel: str
    registers: int
    spill: int
    shared: int


def nvcc() -> str | None:
    """Return nvcc, or None."""
    return shutil.which("nvcc")


def baseline_path() -> Path:
    """Return where the baseline of this version of nvcc lies."""
    said = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", said)
    assert version is not None, said
    return REPO / "tests" / "kernels" / "aot" / f"nvcc_{version[1]}.json"


def measure(source: Path, architecture: str) -> list[Row]:
    """Return a row for each kernel of `source`, named KERNEL.sm_ARCHITECTURE."""
    command = [nvcc(), *OPTIONS, f"-arch=sm_{architecture}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    done = subprocess.run(
        [*map(str, command), "-cubin", str(source), "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return rows_of(done.stderr, architecture)


def rows_of(said: str, architecture: str) -> list[Row]:
    """Return the rows that ptxas -v tells of."""
    rows = []
    for part in said.split("Compiling entry function")[1:]:
        name = re.search(r"'_ZN\d+[a-z_]+?\d+(\w+?_kernel)", part)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
        assert name is not None and spills is not None and registers is not None, part
        rows.append(
            Row(
                f"{name[1]}.sm_{architecture}",
                int(registers[1]),
                int(spills[1]) + int(spills[2]),
                int(shared[1]) if shared else 0,
            )
        )
    return rows


def measure_all() -> list[Row]:
    """Return the rows of all sources and architectures."""
    sources = sorted((REPO / "csrc" / "cuda").glob("*.cu"))
    return [row for source in sources for a in ARCHITECTURES for row in measure(source, a)]


if __name__ == "__main__":
    found = measure_all()
    print("\n".join(json.dumps(asdict(row)) for row in found))
    if "--write" in sys.argv:
        recorded = {row.kernel: {"spill": row.spill, "shared": row.shared} for row in found}
        baseline_path().write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
