# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the CUDA library (csrc/cuda) with ctypes, as kernels/_native.py does the CPU's.

A machine without it is a normal machine: `why_not()` says why, and every op has another implementation. Loading it needs
neither a GPU nor a driver.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels._dispatch import KernelUnavailable

ABI = 1
FILE = "libmasktrain_cuda.so"
BUILD = "cmake -S . -B build/cuda -DMASKTRAIN_CUDA=ON && cmake --build build/cuda"
# What nvcc 13 still builds for.
OLDEST = (7, 5)

_P, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
# name -> (result, arguments), as in csrc/include/masktrain_cuda.h
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "mt_cuda_abi_version": (_INT, []),
    "mt_cuda_error": (ctypes.c_char_p, [_INT]),
    "mt_cuda_select_tokens": (
        _INT,
        [_P, _P, _P, _P, _I64, _I64, _P, _P, _P, _I64, _P, _P, _I64, _INT, _I64, _P],
    ),
}


@torch.compiler.assume_constant_result
def why_not(index: int | None) -> str | None:
    """Return None if the library serves CUDA device `index`, else a sentence that says why not."""
    if torch.cuda.get_device_capability(index) < OLDEST:
        return f"the CUDA library needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
    return _load().reason


def require() -> ctypes.CDLL:
    """Return the library; KernelUnavailable says why there is none."""
    loaded = _load()
    if loaded.library is None:
        raise KernelUnavailable(str(loaded.reason))
    return loaded.library


def stream_of(x: Tensor) -> int:
    """Return the stream that work on `x` belongs to, as a pointer."""
    return torch.cuda.current_stream(x.device).cuda_stream


def check(error: int, what: str) -> None:
    """Raise RuntimeError if `error`, the answer of function `what`, is one."""
    if error:
        raise RuntimeError(f"{what}: CUDA error {error}, {require().mt_cuda_error(error).decode()}")


def describe() -> str:
    """Return one line: which library serves, or why none does."""
    loaded = _load()
    return str(loaded.path or loaded.reason)


@cache
def _load() -> _native._Loaded:
    """Load the first usable library; the reason is that of the first which is not."""
    first_reason = None
    for path in _native._candidates(FILE):
        loaded = _native._open(path, SIGNATURES, ABI, BUILD)
        if loaded.library is not None:
            return loaded
        first_reason = first_reason or loaded.reason
    return _native._Loaded(None, None, first_reason or f"{FILE} is not built; {_native._remedy(BUILD)}")
