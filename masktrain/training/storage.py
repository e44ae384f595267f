# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint: durable writing, and reading that trusts nothing.

Tensors are in the safetensors format (huggingface/safetensors:README.md, "Format"): 8 bytes with the
little-endian length of a JSON header, the header {name: {dtype, shape, data_offsets}}, then the values. It is
written and read here rather than by the library so that one pass both writes and hashes, a full disk keeps
its errno, other threads run meanwhile, and no file is mapped (a map of a file that is cut short later ends
the process with SIGBUS).

Writing raises OSError. Reading raises CheckpointError; it runs no code that a file could bring, follows no
link, and allocates nothing that the file's own size does not cover.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from masktrain.errors import CheckpointError, RunError
from masktrain.training.memory import human_bytes

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK = 4 << 20
_MAX_JSON_BYTES = 64 << 20
_MAX_JSON_DEPTH = 64
_MAX_ELEMENTS = 1 << 48


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (64 hexadecimal digits) of a file."""

    size: int
    sha256: str


# --- writing ---


def write_json(path: Path, data: Any) -> FileRecord:
    """Write `data` as a new JSON file and wait until it is on the disk."""
    return _write(path, iter([memoryview(encode_json(data))]))


def encode_json(data: Any) -> bytes:
    """Return `data` as JSON; ValueError for a NaN or an infinity, which are no JSON."""
    return json.dumps(data, allow_nan=False, indent=1).encode()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write `tensors` as a new safetensors file, bit for bit, and wait until it is on the disk."""
    header: dict[str, Any] = {}
    end = 0
    # widest first, so that every tensor starts at a multiple of its element size
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES or name == "__metadata__":
            raise TypeError(f"checkpoint tensor {name!r}: {tensor.dtype} under this name cannot be stored")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)

    def parts() -> Iterator[memoryview]:
        yield memoryview(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            yield flat.numpy().data

    return _write(path, parts())


def _write(path: Path, parts: Iterator[memoryview]) -> FileRecord:
    digest = hashlib.sha256()
    size = 0
    with open(path, "xb") as file:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                piece = part[start : start + _CHUNK]
                file.write(piece)
                digest.update(piece)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
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


def check_size(path: Path, size: int, record: FileRecord) -> None:
    """Compare the size of a file with its record."""
    if size != record.size:
        damaged(path, f"has {size} bytes where {record.size} were written")


def check_hash(path: Path, file: BufferedReader, record: FileRecord) -> None:
    """Compare the content of a file with its record, in constant memory, and go back to its start."""
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
        damaged(path, "is not what was written (its SHA-256 differs)")
    file.seek(0)


def read_json(path: Path, file: BufferedReader, size: int) -> dict[str, Any]:
    """Return the JSON object of a file."""
    if size > _MAX_JSON_BYTES:
        damaged(path, f"has {size} bytes, more than the {_MAX_JSON_BYTES} that any JSON of a checkpoint has")
    return decode_json(path, file.read(size))


def decode_json(path: Path, text: bytes) -> dict[str, Any]:
    """Return a JSON object: UTF-8, finite numbers, no name twice in an object, at most 64 levels deep."""
    try:
        data = json.loads(
            text.decode("utf-8"), parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique
        )
    except (
        ValueError
    ) as error:  # JSON syntax, bad UTF-8, an integer of thousands of digits, and the two hooks
        damaged(path, f"is not valid JSON ({str(error)[:120]})")
    except RecursionError:
        damaged(path, "is not valid: its JSON is nested too deeply")
    if not isinstance(data, dict):
        damaged(path, f"holds a JSON {type(data).__name__} instead of an object")
    if not _shallow(data):
        damaged(path, f"is not valid: its JSON is more than {_MAX_JSON_DEPTH} levels deep")
    return data


def _shallow(data: dict[str, Any]) -> bool:
    level: list[Any] = [data]
    for _ in range(_MAX_JSON_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        if not inner:
            return True
        level = list(chain.from_iterable(inner))
    return False


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice in an object")
    return out


def read_tensors(path: Path, file: BufferedReader, size: int) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU, in memory of their own."""
    out = {}
    for name, (dtype, shape, count) in _tensor_header(path, file, size).items():
        flat = torch.empty(count, dtype=torch.uint8)
        view = flat.numpy().data
        done = 0
        while done < count:
            read = file.readinto(view[done : done + _CHUNK])
            if not read:
                damaged(path, "ended while it was read")
            done += read
        if dtype is torch.bool and bool((flat > 1).any()):
            damaged(path, f"holds a truth value that is neither 0 nor 1 in {name!r}")
        out[name] = flat.view(dtype).reshape(shape)
    return out


def check_tensors(path: Path, file: BufferedReader, size: int) -> None:
    """Check that a file is in the safetensors format, without reading the values."""
    _tensor_header(path, file, size)


def _tensor_header(
    path: Path, file: BufferedReader, size: int
) -> dict[str, tuple[torch.dtype, list[int], int]]:
    """Return {name: (dtype, shape, bytes)} in the order of the values, which fill the rest of the file
    exactly."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _MAX_JSON_BYTES):
        damaged(path, f"is not in the safetensors format: a header of {length} bytes in a file of {size}")
    header = decode_json(path, file.read(length))
    entries = []
    for name, entry in header.items():
        parsed = _tensor_entry(entry)
        if parsed is None:
            damaged(path, f"is not in the safetensors format: wrong entry of {name[:80]!r}")
        entries.append((*parsed, name))
    position = 0
    out = {}
    for start, end, dtype, shape, name in sorted(entries, key=lambda entry: entry[:2]):
        if start != position:
            damaged(path, f"is not in the safetensors format: a gap or overlap before {name[:80]!r}")
        position = end
        out[name] = (dtype, shape, end - start)
    if 8 + length + position != size:
        damaged(
            path, f"is not in the safetensors format: {8 + length + position} bytes announced, {size} there"
        )
    return out


def _tensor_entry(entry: Any) -> tuple[int, int, torch.dtype, list[int]] | None:
    """Return (start, end, dtype, shape) of a header entry, None for one that contradicts itself."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    shape, offsets = entry["shape"], entry["data_offsets"]
    if dtype is None or not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return None
    # a dimension of 0 must not hide others whose product overflows
    if len(shape) > 16 or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        return None
    start, end = offsets
    return (start, end, dtype, shape) if end - start == math.prod(shape) * dtype.itemsize else None


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
