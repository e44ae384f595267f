# SPDX-License-Identifier: Apache-2.0
"""Files of a run: durable writing, and reading of checkpoints that trusts nothing.

Tensors are in the safetensors format and JSON is strict. Writing raises OSError where nothing else is said. Reading
raises CheckpointError; it runs no code that a file could bring, follows no link and maps no file (a map of a file
that is cut short later ends the process with SIGBUS).
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
from torch import Tensor

from masktrain.errors import CheckpointError, RunError
from masktrain.training.memory import human_bytes

_MAX_JSON_BYTES = 64 << 20
_MAX_JSON_DEPTH = 64


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (64 hexadecimal digits) of a file."""

    size: int
    sha256: str


# --- writing ---


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or, after any failure, as it was before. Raises RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary, content)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise write_failed(path.name, path.parent, error) from error


def write(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    path.write_bytes(content)
    sync(path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write contiguous tensors that share no memory to a safetensors file, and wait until it is on the disk."""
    path.touch()
    mode = path.stat().st_mode
    try:
        safetensors.torch.save_file(tensors, path)
    except safetensors.SafetensorError as error:
        # the library gives the system's error in its text only
        code = re.search(r"os error (\d+)", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
    path.chmod(mode)  # the library lets nobody but the owner read
    sync(path)


def encode_json(data: Any) -> bytes:
    """Return `data` as JSON; ValueError for a NaN or an infinity, which are no JSON."""
    return json.dumps(data, allow_nan=False, indent=1).encode()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot, and need not
            raise
    finally:
        os.close(descriptor)


def write_failed(what: str, path: Path, error: OSError) -> RunError:
    """Return the RunError for a failed write below `path`, with what the user can do about it."""
    code = error.errno
    if code in (errno.ENOSPC, errno.EDQUOT):
        advice = (
            f"no space is left there{_free(path)}. Free some, or keep fewer checkpoints (train.keep_last), "
            "then go on with --resume."
        )
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = f"it may not be written ({os.strerror(code)}). Make it writable or choose another --out."
    elif code == errno.EFBIG:
        advice = "the file would exceed the limit on file sizes; raise it (ulimit -f)."
    else:
        advice = f"{error.strerror or error}. Check the disk, then go on with --resume."
    return RunError(f"{what} could not be written in {path}: {advice}")


def _free(path: Path) -> str:
    try:
        space = os.statvfs(path)
    except OSError:
        return ""
    return f" ({human_bytes(space.f_bavail * space.f_frsize)} free)"


# --- reading ---


@contextmanager
def opened(path: Path) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file, not through a link, and give it with its size in bytes."""
    try:
        with open(path, "rb", opener=_open_file) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                damaged(path, "is not a regular file")
            yield file, status.st_size
    except FileNotFoundError:
        damaged(path, "is missing")
    except OSError as error:
        if error.errno == errno.ELOOP:
            damaged(path, "is a link, which a checkpoint never holds")
        damaged(path, f"cannot be read ({error.strerror or error})")


def _open_file(path: str, flags: int) -> int:
    # without O_NONBLOCK, opening a named pipe in a file's place would wait for a writer for ever
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def damaged(path: Path, why: str) -> NoReturn:
    """Raise the CheckpointError that `path` is not what masktrain wrote."""
    raise CheckpointError(f"{path} {why}.")


def record_of(path: Path) -> FileRecord:
    """Return size and SHA-256 of a file, in constant memory."""
    with opened(path) as (file, size):
        return FileRecord(size, hashlib.file_digest(file, "sha256").hexdigest())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU, in memory of their own."""
    with opened(path) as (file, _):
        content = file.read()
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # its own error, and Python's and torch's for what it lets pass
        damaged(path, f"is not in the safetensors format ({str(error)[:120]})")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file: UTF-8, finite numbers, at most 64 levels deep."""
    with opened(path) as (file, size):
        if size > _MAX_JSON_BYTES:
            damaged(
                path, f"has {size} bytes, more than the {_MAX_JSON_BYTES} that any JSON of a checkpoint has"
            )
        content = file.read(size)
    try:
        data = json.loads(content.decode(), parse_float=_finite, parse_constant=_finite)
    except ValueError as error:  # also bad UTF-8, an integer of thousands of digits, and `_finite`
        damaged(path, f"is not valid JSON ({str(error)[:120]})")
    except RecursionError:
        damaged(path, "is not valid: its JSON is nested too deeply")
    if not isinstance(data, dict):
        damaged(path, f"holds a JSON {type(data).__name__} instead of an object")
    if _deeper(data, _MAX_JSON_DEPTH):
        damaged(path, f"is not valid: its JSON is more than {_MAX_JSON_DEPTH} levels deep")
    return data


def _deeper(data: Any, levels: int) -> bool:
    if not isinstance(data, dict | list):
        return False
    inner = data.values() if isinstance(data, dict) else data
    return levels == 0 or any(_deeper(value, levels - 1) for value in inner)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value
