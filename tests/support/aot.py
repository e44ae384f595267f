# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not there, and reads registers, spills and shared memory.

Every file of tests/kernels/aot/ has `cases()`: calls of an op's Triton functions on small CPU tensors. While such a
call runs, a launch compiles its kernel instead, for a device of the wished compute capability and specialised by
Triton itself on the very arguments of the launch. So what is measured is what a GPU would run; the results of the
call are memory that nobody wrote.

    python tests/support/aot.py [--op OP ...] [--cc 80 90] [--write]

prints a row per kernel. `--write` records spill bytes and shared memory in tests/kernels/aot/triton_VERSION.json, for
the ops that were compiled, and leaves the others alone. Triton must be imported without TRITON_INTERPRET. Compiled
kernels are cached by Triton itself, by source, version and signature.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent.parent / "kernels" / "aot"
# Bytes of shared memory that one block may use, by compute capability (CUDA C++ programming guide, table of
# technical specifications).
SHARED_LIMIT = {70: 98304, 80: 166912, 89: 101376, 90: 232448}
TENSOR_CORES = (80, 89, 90)
ALL = (70, *TENSOR_CORES)


@dataclass(frozen=True)
class Case:
    """One call of Triton functions. name: what tells it apart in its file, such as the dtype. architectures:
    compute capabilities to compile for; kernels without tl.dot compile for sm_70 too."""

    name: str
    call: Callable[[], object]
    architectures: tuple[int, ...] = ALL


@dataclass(frozen=True)
class Row:
    """One kernel as compiled for one compute capability. spill: bytes of spill stores and loads."""

    kernel: str
    registers: int
    spill: int
    shared: int


class NoGPU:
    """Just enough of a driver for Triton to specialise and compile a kernel."""

    def __init__(self, cc: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", cc, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def launches_compile(cc: int) -> Iterator[list[tuple[str, Any]]]:
    """Let each launch compile its kernel for `cc`; yields a list that gets (name, compiled kernel) of each."""
    import triton
    from triton.runtime.driver import driver

    compiled: list[tuple[str, Any]] = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.fn.__name__, kernel))
        return kernel

    driver.set_active(NoGPU(cc))
    triton.runtime.jit.JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        triton.runtime.jit.JITFunction.run = run


def read_out(kernel: Any) -> tuple[int, int, int]:
    """Return (registers per thread, bytes of spill stores and loads, bytes of shared memory) of a compiled kernel."""
    from triton.backends.nvidia import compiler

    ptxas = Path(compiler.__file__).parent / "bin" / "ptxas"
    # Spills depend on it, and not every version of Triton asks for it.
    allocation = "--regAllocOptLevel=2"
    options = [allocation] if allocation.split("=")[0] in inspect.getsource(compiler) else []
    ptx = kernel.asm["ptx"]
    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", "-lineinfo", *options, f"-arch={target[1]}", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None and spills is not None, said
    return int(registers[1]), int(spills[1]) + int(spills[2]), kernel.metadata.shared


def measure(name: str, case: Case, cc: int) -> list[Row]:
    """Return a row for each different kernel that the call compiles, named NAME[CASE].KERNEL.sm_CC."""
    with launches_compile(cc) as compiled:
        case.call()
    assert compiled, f"{name}[{case.name}]: the call launched no Triton kernel"
    rows, seen = [], set()
    times: dict[str, int] = {}
    for function, kernel in compiled:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            times[function] = times.get(function, 0) + 1
            variant = f"#{times[function]}" if times[function] > 1 else ""
            rows.append(Row(f"{name}[{case.name}].{function}{variant}.sm_{cc}", *read_out(kernel)))
    return rows


def case_files() -> list[Path]:
    """Return the files that have cases; each is named as its op."""
    return sorted(FOLDER.glob("*.py"))


def cases_of(path: Path) -> list[Case]:
    """Return the cases of one file."""
    spec = importlib.util.spec_from_file_location(f"aot_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return list(module.cases())


def baseline_path() -> Path:
    """Return where the baseline of this version of Triton lies."""
    import triton

    return FOLDER / f"triton_{triton.__version__}.json"


def main(arguments: Sequence[str]) -> None:
    """Compile, print a JSON line per kernel, and record the baseline if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", nargs="*", default=[path.stem for path in case_files()])
    parser.add_argument("--cc", nargs="*", type=int, default=ALL)
    parser.add_argument("--write", action="store_true", help="record the baseline of these ops")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("unset TRITON_INTERPRET: an interpreted kernel is not compiled")
    found: dict[str, dict[str, dict[str, int]]] = {}
    for op in options.op:
        found[op] = {}
        for case in cases_of(FOLDER / f"{op}.py"):
            for cc in sorted(set(case.architectures) & set(options.cc)):
                for row in measure(op, case, cc):
                    print(json.dumps(asdict(row)), flush=True)
                    found[op][row.kernel] = {"spill": row.spill, "shared": row.shared}
    if options.write:
        path = baseline_path()
        recorded = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(dict(sorted((recorded | found).items())), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
