# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the native library (csrc/) with ctypes.

A machine without it is a normal machine: `cpu()` is None, `why_not()` says why and how to build it, and every
op has another implementation.
"""

from __future__ import annotations

import ctypes
import importlib.resources
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Before the library: both use OpenMP, and the runtime that is loaded first should be torch's.
import torch

from masktrain.kernels._dispatch import KernelUnavailable

ABI = 3
ENV = "MASKTRAIN_LIB_DIR"
FILE = "libmasktrain_cpu.so"
BUILD = "cmake -S . -B build/dev -DCMAKE_BUILD_TYPE=Release && cmake --build build/dev"
LEVELS = ("baseline", "AVX2", "AVX-512")

_P, _I64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_F32, _F64 = ctypes.c_float, ctypes.c_double
_LOG_MEL: list[type] = [_P, _P, _P, _P, _I64, _P, _I64, _P, _I64, _I64, _I64, _INT, _INT, _F64, _F64]
_LOG_MEL += [_INT, _P, _P, _P, _I64, _INT, _F64, _F64, _F64, _P, _INT]
_PATCHES: list[type] = [_P, _I64, _I64, _P, _P, _I64, _P, _I64, _P, _P, _I64, _I64, _I64, _INT]
# name -> (result, arguments), as in csrc/include/masktrain_c.h
SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "mt_abi_version": (_INT, []),
    "mt_cpu_level": (_INT, []),
    "mt_set_cpu_level": (_INT, [_INT]),
    "mt_has_openmp": (_INT, []),
    "mt_philox_words": (None, [_P, _P, _P, _I64, _I64, _I64, _I64, _INT]),
    "mt_dropout_f32": (None, [_P, _P, _P, _P, _P, _I64, _I64, _I64, _I64, _F32, _INT]),
    "mt_dropout_f64": (None, [_P, _P, _P, _P, _P, _I64, _I64, _I64, _I64, _F64, _INT]),
    "mt_attention_keep_f32": (None, [_P, _P, _P, _I64, _I64, _I64, _I64, _I64, _I64, _F32, _INT]),
    "mt_attention_keep_f64": (None, [_P, _P, _P, _I64, _I64, _I64, _I64, _I64, _I64, _F64, _INT]),
    "mt_log_mel_f32": (None, _LOG_MEL),
    "mt_log_mel_f64": (None, _LOG_MEL),
    "mt_resample_f32": (None, [_P, _P, _P, _I64, _P, *[_I64] * 6, _P, _INT]),
    "mt_resample_f64": (None, [_P, _P, _P, _I64, _P, *[_I64] * 6, _P, _INT]),
    "mt_mask_gather_f32": (None, [_P, *_PATCHES, _INT]),
    "mt_mask_gather_f64": (None, [_P, *_PATCHES, _INT]),
    "mt_mask_scatter": (None, [_P, _P, _P, _P, _I64, _P, _I64, _I64, _INT]),
    "mt_mask_scatter_grad_f32": (None, [_P, _P, _P, _P, _I64, _P, _I64, _I64, _P, _INT]),
    "mt_mask_scatter_grad_f64": (None, [_P, _P, _P, _P, _I64, _P, _I64, _I64, _P, _INT]),
    "mt_masked_patch_loss_f32": (None, [_P, _P, _P, *_PATCHES, _INT, _INT]),
    "mt_masked_patch_loss_grad_f32": (None, [_P, _P, _P, *_PATCHES, _INT, _INT]),
    "mt_masked_patch_loss_f64": (None, [_P, _P, _P, *_PATCHES, _INT, _INT]),
    "mt_masked_patch_loss_grad_f64": (None, [_P, _P, _P, *_PATCHES, _INT, _INT]),
    "mt_ncut_scores": (None, [_P, _P, _P, _P, _I64, _I64, _INT, _INT, _P, _I64, _INT]),
    "mt_patch_mad_f32": (None, [_P, *_PATCHES, _INT]),
    "mt_patch_mad_f64": (None, [_P, *_PATCHES, _INT]),
    "mt_window_attention_f32": (None, [*[_P] * 5, *[_I64] * 5, _INT]),
    "mt_window_attention_f64": (None, [*[_P] * 5, *[_I64] * 5, _INT]),
    "mt_window_attention_grad_f32": (None, [*[_P] * 9, *[_I64] * 5, _INT]),
    "mt_window_attention_grad_f64": (None, [*[_P] * 9, *[_I64] * 5, _INT]),
    "mt_select_tokens": (
        None,
        [_P, _P, _P, _P, _I64, _P, _P, _P, _I64, _P, _P, _I64, _INT, _P, _I64, _INT],
    ),
    "mt_block_marks": (
        None,
        [_P, _P, _P, _I64, _P, _P, _I64, _INT, _P, _I64, _INT, _INT, _INT, _I64, _INT, _P, _I64, _INT],
    ),
    "mt_clamped_blocks": (None, [_P, _P, _P, _I64, _P, _P, _I64, _INT, _I64, _I64, _INT, _INT]),
}


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL | None
    path: Path | None
    reason: str | None


def cpu() -> ctypes.CDLL | None:
    """Return the library of CPU functions, or None if there is none that can be used."""
    return _load().library


@torch.compiler.assume_constant_result
def why_not() -> str | None:
    """Return None if `cpu()` is there, else a sentence that says why not and what to do.

    A compiled function asks when it is compiled, not each time it runs.
    """
    return _load().reason


def require() -> ctypes.CDLL:
    """Return the library of CPU functions; KernelUnavailable says why there is none."""
    loaded = _load()
    if loaded.library is None:
        raise KernelUnavailable(str(loaded.reason))
    return loaded.library


def threads() -> int:
    """Return how many threads a native function may use: as many as torch's own."""
    return torch.get_num_threads()


def describe() -> str:
    """Return one line: which library serves with which instruction set, or why none does."""
    loaded = _load()
    if loaded.library is None:
        return str(loaded.reason)
    threading = "OpenMP" if loaded.library.mt_has_openmp() else "no OpenMP: one thread"
    return f"{loaded.path} ({LEVELS[loaded.library.mt_cpu_level()]}, {threading})"


@cache
def _load() -> _Loaded:
    """Load the first usable library of `_candidates`; the reason is that of the first which is not."""
    first_reason = None
    for path in _candidates():
        loaded = _open(path)
        if loaded.library is not None:
            return loaded
        first_reason = first_reason or loaded.reason
    return _Loaded(None, None, first_reason or f"{FILE} is not built; {_remedy()}")


def _candidates(file: str = FILE) -> Iterator[Path]:
    """Where the library may lie, best first: the named folder alone; else as installed; else as built."""
    named = os.environ.get(ENV)
    if named:
        yield Path(named) / file
        return
    # Not beside this file: an editable install leaves the sources where they are and the library elsewhere.
    installed = importlib.resources.files("masktrain") / "_lib" / file
    if installed.is_file():
        yield Path(str(installed))
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / "CMakeLists.txt").is_file():
        yield from sorted((checkout / "build").rglob(file), key=lambda p: p.stat().st_mtime, reverse=True)


def _open(
    path: Path,
    signatures: dict[str, tuple[type | None, list[type]]] = SIGNATURES,
    abi: int = ABI,
    build: str = BUILD,
) -> _Loaded:
    """Load the library at `path`; the first of `signatures` is the function that answers its interface version."""
    if not path.is_file():
        return _Loaded(None, None, f"{path} does not exist, where {ENV} says it is; {_remedy(build)}")
    try:
        library = ctypes.CDLL(str(path))
        found = getattr(library, next(iter(signatures)))()
        if found != abi:
            return _Loaded(None, None, f"{path} has interface version {found}, not {abi}; {_remedy(build)}")
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return _Loaded(None, None, f"{path} cannot be used ({error}); {_remedy(build)}")
    return _Loaded(library, path, None)


def _remedy(build: str = BUILD) -> str:
    return f"in the source tree, run `{build}`, or install the package again."
