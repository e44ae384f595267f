# SPDX-License-Identifier: Apache-2.0
"""Finding and refusing the native library; its C header and its Python signatures say the same."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from masktrain.kernels import _cuda_native, _native
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels.philox import Purpose, philox_words

REPO = Path(__file__).resolve().parents[2]
HEADERS = REPO / "csrc" / "include"


@pytest.fixture
def lib_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which, and only there, the library is looked for."""
    monkeypatch.setenv(_native.ENV, str(tmp_path))
    _native._load.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    _native._load.cache_clear()


def compile_library(folder: Path, source: str) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "lib.cpp").write_text(source)
    subprocess.run(
        [compiler, "-shared", "-fPIC", str(folder / "lib.cpp"), "-o", str(folder / _native.FILE)], check=True
    )


def assert_absent(match: str) -> None:
    assert _native.cpu() is None
    reason = _native.why_not()
    assert reason is not None and re.search(match, reason) and "cmake --build build/dev" in reason
    assert _native.describe() == reason
    with pytest.raises(KernelUnavailable, match=match):
        _native.require()


def test_an_absent_library_is_normal(lib_dir: Path) -> None:
    assert_absent("does not exist")
    words = philox_words(torch.tensor([1, 2]), torch.arange(3), 5, purpose=Purpose.MASK)
    assert words.shape == (3, 5)
    with pytest.raises(KernelUnavailable, match=r"native was asked for and cannot serve: .* does not exist"):
        philox_words(torch.tensor([1, 2]), torch.arange(3), 5, purpose=Purpose.MASK, implementation="native")


def test_a_damaged_library_is_refused(lib_dir: Path) -> None:
    (lib_dir / _native.FILE).write_bytes(b"not a library")
    assert_absent("cannot be used")


def test_another_interface_version_is_refused(lib_dir: Path) -> None:
    compile_library(lib_dir, f'extern "C" int mt_abi_version() {{ return {_native.ABI + 1}; }}')
    assert_absent(f"interface version {_native.ABI + 1}, not {_native.ABI}")


def test_a_missing_function_is_refused(lib_dir: Path) -> None:
    compile_library(lib_dir, f'extern "C" int mt_abi_version() {{ return {_native.ABI}; }}')
    assert_absent("cannot be used .*undefined symbol")


def test_an_unusable_library_does_not_hide_a_usable_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = _native._load().path
    if serving is None:
        pytest.skip(f"{_native.why_not()}")
    (tmp_path / _native.FILE).write_bytes(b"not a library")
    monkeypatch.setattr(_native, "_candidates", lambda: iter([tmp_path / _native.FILE, serving]))
    _native._load.cache_clear()
    try:
        assert _native._load().path == serving and _native.why_not() is None
    finally:
        _native._load.cache_clear()


def test_the_library_is_described() -> None:
    library = _native.cpu()
    if library is None:
        pytest.skip(f"{_native.why_not()}")
    assert _native.FILE in _native.describe()
    assert _native.LEVELS[library.mt_cpu_level()] in _native.describe()


def test_importing_loads_nothing(tmp_path: Path) -> None:
    """A damaged library is noticed at the first use, not at import."""
    (tmp_path / _native.FILE).write_bytes(b"not a library")
    code = "from masktrain.kernels import _native, philox, dropout; print(_native._load.cache_info().misses)"
    paths = os.pathsep.join(p for p in (str(REPO), os.environ.get("PYTHONPATH")) if p)
    environment = os.environ | {_native.ENV: str(tmp_path), "PYTHONPATH": paths}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert out.stdout.strip() == "0"


@pytest.mark.parametrize(
    ("header", "loader"),
    [("masktrain_c.h", _native), ("masktrain_cuda.h", _cuda_native)],
    ids=["cpu", "cuda"],
)
def test_python_signatures_are_those_of_the_header(header: str, loader: ModuleType) -> None:
    """Calls through ctypes are checked by nobody else."""
    text = re.sub(r"//.*", "", (HEADERS / header).read_text())
    types = {
        "int": ctypes.c_int,
        "int64_t": ctypes.c_int64,
        "float": ctypes.c_float,
        "double": ctypes.c_double,
        "const char*": ctypes.c_char_p,
    }
    declared = {}
    for result, name, arguments in re.findall(r"MT_API (void|int|const char\*) (mt_\w+)\(([^)]*)\)", text):
        parsed = [
            ctypes.c_void_p if "*" in argument else types[argument.split()[-2]]
            for argument in arguments.split(",")
            if argument.strip() != "void"
        ]
        declared[name] = (None if result == "void" else types[result], parsed)
    assert len(declared) == len(re.findall(r"\bmt_\w+\(", text))
    assert declared == loader.SIGNATURES
    version = re.search(r"MT_\w*ABI_VERSION (\d+)", text)
    assert version is not None and int(version.group(1)) == loader.ABI
