#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Everything that needs a GPU, in one command, most important first.

It asks only for a source checkout, Python, torch with CUDA, Triton and numpy: it builds the native library itself where
there is a compiler, and reads the golden data from MASKTRAIN_GOLDEN_DIR where they are. Every check writes rows to
RESULTS/results.jsonl at once; one that cannot run says why, and one that fails stops none of the others.

    python benchmarks/gpu_suite.py --seconds 540 --out results/
    python benchmarks/gpu_suite.py --only "verify varlen_attention" --out results/
    python benchmarks/gpu_suite.py --device cpu      # rehearsal: every check, small, Triton interpreted

--resume goes on where an earlier run ended: checks that have a row are left out. Exit status 1 if an answer is wrong
or a check failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suite.harness import Check, Row

REPO = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the suite and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearsal")
    parser.add_argument("--seconds", type=float, default=1800, help="no check starts after so many seconds")
    parser.add_argument(
        "--only", action="append", default=[], help="checks whose name contains this (repeatable)"
    )
    parser.add_argument("--resume", action="store_true", help="leave out checks that have a row in --out")
    parser.add_argument("--out", type=Path, default=Path("gpu_suite_results"), help="folder of results.jsonl")
    parser.add_argument("--list", action="store_true", help="print the names of the checks and end")
    # set when the suite starts itself again, after a kernel has made the GPU useless to its process
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    rehearsal = options.device == "cpu"
    if rehearsal:
        os.environ["TRITON_INTERPRET"] = "1"
    _find_modules(rehearsal)

    import torch
    from suite import harness

    if not rehearsal and not torch.cuda.is_available():
        print(
            "This torch finds no CUDA device. --device cpu rehearses the suite without one.", file=sys.stderr
        )
        return 2
    device = torch.device(options.device)
    checks = [
        c for c in _checks(device, rehearsal) if not options.only or any(o in c.name for o in options.only)
    ]
    if options.list:
        print("\n".join(check.name for check in checks))
        return 0
    results = harness.Results(options.out / "results.jsonl", resume=options.resume)
    until = options.until or time.time() + options.seconds
    try:
        harness.run(checks, results, device, until)
    except harness.Lost:
        print("The GPU no longer answers in this process: going on in a new one.", flush=True)
        again = [a for a in sys.argv if a != "--resume"] + ["--resume"]
        os.execv(
            sys.executable, [sys.executable, *again, *([] if options.until else ["--until", str(until)])]
        )
    rows = harness.read(results.path)
    counts = {
        status: sum(r["status"] == status for r in rows) for status in sorted({r["status"] for r in rows})
    }
    print(f"{results.path}: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    return 1 if counts.get(harness.WRONG) or counts.get(harness.ERROR) else 0


def _find_modules(rehearsal: bool) -> None:
    """Make the checkout importable, also where only torch, Triton and numpy are installed."""
    sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]
    # Imported on the way to the training step, whose own work needs neither: command line options, and checkpoints.
    for name in ("tyro", "safetensors"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = ModuleType(name)
            if name == "safetensors":
                sys.modules["safetensors.torch"] = ModuleType("safetensors.torch")
                sys.modules[name].torch = sys.modules["safetensors.torch"]  # type: ignore[attr-defined]
    if rehearsal and importlib.util.find_spec("triton"):
        sys.path.append(str(REPO / "tests" / "support"))
        import interpreter

        interpreter.patch()


def _checks(device: object, rehearsal: bool) -> list[Check]:
    import torch
    from suite import golden, masking, properties, steps
    from suite.harness import Check
    from suite.kernels import Kernels

    assert isinstance(device, torch.device)
    kernels = Kernels(device, rehearsal=rehearsal)
    folder = Path(os.environ.get("MASKTRAIN_GOLDEN_DIR", REPO.parent / "shared" / "golden"))
    return [
        Check("machine", "What was this measured with?", lambda: _machine(device)),
        Check("build native", "Does the native library build and load here?", _build),
        Check("build cuda", "Does the CUDA library build and load here?", lambda: _build_cuda(device)),
        *kernels.verify(),
        *properties.checks(device, rehearsal=rehearsal),
        *golden.checks(device, folder),
        kernels.calibration(),
        *steps.checks(device, rehearsal=rehearsal, variants=False),
        *masking.checks(device, rehearsal=rehearsal),
        *kernels.bench(),
        *steps.checks(device, rehearsal=rehearsal, variants=True),
    ]


def _machine(device: object) -> Row:
    import torch

    from masktrain.training.bench import provenance

    assert isinstance(device, torch.device)
    return {"python": sys.version.split()[0], **provenance(device)}


def _build() -> Row:
    from masktrain.kernels import _native

    if _native.cpu() is None:
        _cmake("build/gpu", "-DMASKTRAIN_CUDA=OFF")
        _native._load.cache_clear()
    assert _native.cpu() is not None, _native.why_not()
    return {"library": _native.describe()}


def _build_cuda(device: object) -> Row:
    from suite.harness import CannotRun

    from masktrain.kernels import _cuda_native

    if _cuda_native._load().library is None:
        if "cuda" not in str(device):
            raise CannotRun("the CUDA library serves a GPU")
        compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if compiler is None:
            raise CannotRun("no nvcc here")
        _cmake(
            "build/gpu_cuda",
            "-DMASKTRAIN_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={compiler}",
            target="masktrain_cuda",
        )
        _cuda_native._load.cache_clear()
    assert _cuda_native._load().library is not None, _cuda_native.describe()
    return {"library": _cuda_native.describe()}


def _cmake(folder: str, *options: str, target: str = "all") -> None:
    from suite.harness import CannotRun

    if shutil.which("cmake") is None:
        raise CannotRun("no cmake here")
    for command in (
        ["cmake", "-S", ".", "-B", folder, "-DCMAKE_BUILD_TYPE=Release", *options],
        ["cmake", "--build", folder, "--target", target, "-j", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, json.dumps({"command": command, "error": done.stderr[-1500:]})


if __name__ == "__main__":
    sys.exit(main())
