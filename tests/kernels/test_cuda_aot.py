# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda compiles for every architecture, and spills and shared memory are no worse than recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_aot
import pytest

from masktrain.kernels import _cuda_native, _native

needs_nvcc = pytest.mark.skipif(cuda_aot.nvcc() is None, reason="no nvcc")


@needs_nvcc
def test_compiles_within_the_baseline(capsys: pytest.CaptureFixture[str]) -> None:
    baseline = cuda_aot.baseline_path()
    if not baseline.exists():
        pytest.skip(f"no {baseline.name}; record one with `python tests/support/cuda_aot.py --write`")
    rows = cuda_aot.measure_all()
    with capsys.disabled():
        for row in rows:
            print(f"\n{row.kernel:70} {row.registers:4} registers {row.spill:6} B spilled", end="")
    recorded = json.loads(baseline.read_text())
    assert set(recorded) == {row.kernel for row in rows}, "record the baseline again"
    for row in rows:
        assert row.spill <= recorded[row.kernel]["spill"], row
        assert row.shared <= recorded[row.kernel]["shared"], row


def test_what_ptxas_says_is_read() -> None:
    said = """ptxas info    : Compiling entry function '_ZN14masktrain_cuda12other_kernelEPi' for 'sm_80'
    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 48 registers, used 1 barriers, 1104 bytes smem, 432 bytes cmem[0]
ptxas info    : Compiling entry function '_ZN14masktrain_cuda8a_kernelEPi' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, 432 bytes cmem[0]"""
    assert cuda_aot.rows_of(said, "80") == [
        cuda_aot.Row("other_kernel.sm_80", 48, 16, 1104),
        cuda_aot.Row("a_kernel.sm_80", 255, 0, 0),
    ]


@needs_nvcc
@pytest.mark.slow(covers=["CMakeLists.txt", "csrc/cuda", "csrc/include", "kernels/_cuda_native.py"])
def test_cmake_builds_it_and_it_loads_without_a_driver(tmp_path: Path) -> None:
    configure = ["cmake", "-S", cuda_aot.REPO, "-B", tmp_path, "-DMASKTRAIN_CUDA=ON"]
    for command in (configure, ["cmake", "--build", tmp_path, "--target", "masktrain_cuda"]):
        subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=280)
    code = """if True:
        from masktrain.kernels import _cuda_native
        print(_cuda_native.describe())
        _cuda_native.check(_cuda_native.require().mt_cuda_select_tokens(
            None, None, None, None, 0, 0, None, None, None, 0, None, None, 0, 0, 8000, None), "select_tokens")"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=cuda_aot.REPO,
        env=os.environ | {_native.ENV: str(tmp_path), "PYTHONPATH": str(cuda_aot.REPO)},
    )
    assert str(tmp_path / _cuda_native.FILE) in done.stdout, done.stderr
    # more tokens than fit
    assert "RuntimeError: select_tokens: CUDA error 1, invalid argument" in done.stderr


def test_an_absent_library_is_normal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_native.ENV, str(tmp_path))
    monkeypatch.setattr(_cuda_native, "_load", _cuda_native._load.__wrapped__)
    assert "does not exist" in _cuda_native.describe() and "-DMASKTRAIN_CUDA=ON" in _cuda_native.describe()
    with pytest.raises(_cuda_native.KernelUnavailable, match="does not exist"):
        _cuda_native.require()
    # the CPU library is not taken for it
    cpu = _native._load.__wrapped__().path
    monkeypatch.delenv(_native.ENV)
    cpu = cpu or _native._load().path
    if cpu is not None:
        (tmp_path / _cuda_native.FILE).symlink_to(cpu)
        monkeypatch.setenv(_native.ENV, str(tmp_path))
        assert "cannot be used" in _cuda_native.describe()
