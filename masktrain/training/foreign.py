# SPDX-License-Identifier: Apache-2.0
"""Weights of other programs: safetensors, npz, and the zip files that torch.save writes, read without trust.

What a file says is checked against the bytes that it has before memory is taken, nothing is unpacked to the disk, and
the pickle inside a torch file is read as data (masktrain/training/pickles.py). Raises CheckpointError.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masktrain.training import storage
from masktrain.training.pickles import MAX_BYTES, Call, Name, Persistent, PickleError, read_pickle
from masktrain.training.storage import damaged

STATE_KEYS = ("model", "state_dict", "model_state_dict")
"""Where the reference projects keep the weights within what they save."""
DATA_PARALLEL = "module."
MAX_NAME = 200
_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
_NUMPY = {"<f2", "<f4", "<f8", "<i2", "<i4", "<i8", "|i1", "|u1", "|b1"}
# npz files may be deflated; weights hardly shrink, a bomb grows a thousandfold
_MOST_GROWTH = 200
_ALWAYS_ALLOWED = 64 << 20
_MAX_HEADER = 10_000


@dataclass(frozen=True)
class ForeignWeights:
    """state: the tensors by name, on the CPU, contiguous, each in memory of its own. others: {name: what it is} of
    what stands among them and is no dense tensor."""

    state: dict[str, Tensor]
    others: dict[str, str]


def read_weights(path: Path) -> ForeignWeights:
    """Return the weights that a file of another program holds; the form is told by its content.

    Of a torch file the state dict is taken, be it all of the file or under one of STATE_KEYS; the prefix that
    DataParallel puts before every name is taken off.
    """
    path = _followed(path)
    with storage.opened(path) as (file, size):
        start = file.read(16)
        if size == 0:
            damaged(path, "is empty")
        if start.startswith(b"PK"):
            weights = _read_zip(path, file, size)
        elif start[8:9] == b"{":
            weights = ForeignWeights(storage.read_tensors(path), {})
        elif start.startswith(b"\x80"):
            damaged(
                path,
                "is a plain pickle or of torch's format before 1.6, which are not read. Save its state dict "
                "as safetensors with the program that it belongs to",
            )
        else:
            damaged(path, "is no safetensors, npz or torch file")
    if not weights.state:
        damaged(path, "holds no tensor")
    for name in (*weights.state, *weights.others):
        if not name.isascii() or not name.isprintable() or len(name) > MAX_NAME:
            damaged(path, f"names a tensor {name[:80]!a}, which no model would")
    return _without_prefix(weights)


def _followed(path: Path) -> Path:
    """Return the file that a link names: caches of downloads are made of links."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        damaged(path, f"cannot be found ({_line(error)})")


def _line(error: Exception) -> str:
    return " ".join(ascii(str(error))[1:-1].split())[:120]


def _without_prefix(weights: ForeignWeights) -> ForeignWeights:
    if not all(name.startswith(DATA_PARALLEL) for name in (*weights.state, *weights.others)):
        return weights
    state = {name.removeprefix(DATA_PARALLEL): tensor for name, tensor in weights.state.items()}
    others = {name.removeprefix(DATA_PARALLEL): what for name, what in weights.others.items()}
    return ForeignWeights(state, others)


# --- zip files ---


@contextmanager
def _zip_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        OverflowError,
        RuntimeError,  # an encrypted member
        ValueError,
    ) as error:
        damaged(path, f"is no sound zip file ({_line(error)})")


def _read_zip(path: Path, file: Any, size: int) -> ForeignWeights:
    with _zip_errors(path), zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            damaged(path, "holds two members of one name")
        if sum(info.file_size for info in members.values()) > _ALWAYS_ALLOWED + _MOST_GROWTH * size:
            damaged(path, "would unpack to far more than weights of its size can")
        pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        if pickles:
            return _TorchFile(path, archive, size, members, pickles).weights()
        if members and all(name.endswith(".npy") for name in members):
            state = {name.removesuffix(".npy"): _read_array(path, archive, members[name]) for name in members}
            return ForeignWeights(state, {})
    damaged(path, "is a zip file, but neither torch's nor numpy's")


def _member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    content = archive.read(info)  # with its checksum
    if len(content) != info.file_size:
        damaged(path, f"is cut short in {info.filename[:80]!a}")
    return content


def _read_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Tensor:
    content = BytesIO(_member(path, archive, info))
    version = np.lib.format.read_magic(content)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(content, _MAX_HEADER)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(content, _MAX_HEADER)
    else:
        damaged(path, f"holds {info.filename[:80]!a} in a form that no array of numbers has")
    shape, fortran, dtype = header
    if dtype.str not in _NUMPY:
        damaged(path, f"holds {info.filename[:80]!a} of type {dtype.str[:20]}, which no weight has")
    values = content.read()
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(values):
        damaged(path, f"holds {info.filename[:80]!a}, whose shape {shape[:8]} does not fit its bytes")
    if not values:
        return torch.empty(shape, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
    array = np.frombuffer(bytearray(values), dtype).reshape(shape, order="F" if fortran else "C")
    return torch.from_numpy(np.ascontiguousarray(array).reshape(shape))


class _TorchFile:
    """A zip file of torch.save: data.pkl, and the memory of each storage as a member data/KEY, all uncompressed."""

    def __init__(
        self,
        path: Path,
        archive: zipfile.ZipFile,
        size: int,
        members: dict[str, zipfile.ZipInfo],
        pickles: list[str],
    ) -> None:
        self.path = path
        self.archive = archive
        self.members = members
        if len(pickles) > 1:
            damaged(path, "holds two pickles; a torch file has one")
        self.root = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            damaged(path, "holds compressed members; torch writes none")
        # nothing is compressed, so more than the file has means members that lie over each other
        if sum(info.file_size for info in members.values()) > size:
            damaged(path, "holds members that overlap")
        order = members.get(f"{self.root}byteorder")
        if order is not None and _member(path, archive, order) != b"little":
            damaged(path, "was written on a big-endian machine, which is not read")
        self.pickle = members[pickles[0]]

    def weights(self) -> ForeignWeights:
        """Return the tensors of the state dict; of the rest of the file nothing is read."""
        if self.pickle.file_size > MAX_BYTES:
            damaged(self.path, f"has a pickle of {self.pickle.file_size} bytes, which no checkpoint needs")
        try:
            root = read_pickle(_member(self.path, self.archive, self.pickle))
        except PickleError as error:
            damaged(self.path, f"cannot be read: {error}")
        state: dict[str, Tensor] = {}
        others: dict[str, str] = {}
        for name, value in self._state(root).items():
            found = _tensor_call(value)
            if found is None:
                others[str(name)] = _what(value)
            else:
                state[str(name)] = self._tensor(str(name), found)
        return ForeignWeights(state, others)

    def _state(self, root: Any) -> Mapping[Any, Any]:
        top = _mapping(root)
        if top is None:
            damaged(self.path, f"holds {_what(root)} where a state dict is expected. Save its state_dict()")
        for candidate in (*(_mapping(top.get(key)) for key in STATE_KEYS), top):
            if candidate and any(_tensor_call(value) for value in candidate.values()):
                return candidate
        keys = ", ".join(f"{str(key)[:40]!a}" for key in list(top)[:10]) or "nothing"
        damaged(self.path, f"holds {keys}, and no state dict under {', '.join(STATE_KEYS)} or at the top")

    def _tensor(self, name: str, call: Call) -> Tensor:
        """Return the tensor of torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, ...)."""
        wrong = f"has a damaged tensor {name[:80]!a}"
        if len(call.args) < 4 or not isinstance(call.args[0], Persistent):
            damaged(self.path, wrong)
        storage_key, offset, shape, strides = call.args[0].key, *call.args[1:4]
        if not _counts((offset,)) or not _counts(shape) or not _counts(strides) or len(shape) != len(strides):
            damaged(self.path, wrong)
        values = self._storage(name, storage_key)
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        # a stride of 0 would make a tensor of any size out of one number
        if math.prod(shape) > len(values) or (math.prod(shape) and last >= len(values)):
            damaged(self.path, f"{wrong}: {shape[:8]} do not fit {len(values)} values")
        if not math.prod(shape):
            return values.new_empty(shape)
        return values.as_strided(shape, strides, offset).clone(memory_format=torch.contiguous_format)

    def _storage(self, name: str, key: Any) -> Tensor:
        """Return the values of ("storage", type, key, place, number of values)."""
        if not (
            isinstance(key, tuple) and len(key) >= 5 and key[0] == "storage" and isinstance(key[1], Name)
        ):
            damaged(self.path, f"has a damaged tensor {name[:80]!a}")
        dtype = _DTYPES.get(key[1].text)
        if dtype is None:
            damaged(self.path, f"holds {name[:80]!a} as {key[1].text[:80]!a}, which no weight has")
        info = self.members.get(f"{self.root}data/{key[2]}") if isinstance(key[2], str) else None
        if info is None:
            damaged(self.path, f"lacks the values of {name[:80]!a}")
        if not _counts((key[4],)) or info.file_size != key[4] * dtype.itemsize:
            damaged(
                self.path, f"has {info.file_size} bytes for the values of {name[:80]!a}, which do not fit"
            )
        content = _member(self.path, self.archive, info)
        return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def _mapping(value: Any) -> Mapping[Any, Any] | None:
    if isinstance(value, dict):
        return value
    return value.items if isinstance(value, Call) and value.name == "collections.OrderedDict" else None


def _tensor_call(value: Any) -> Call | None:
    """Return the record of a dense tensor or parameter."""
    if isinstance(value, Call) and value.name == "torch._utils._rebuild_parameter" and value.args:
        value = value.args[0]
    return value if isinstance(value, Call) and value.name == "torch._utils._rebuild_tensor_v2" else None


def _what(value: Any) -> str:
    if isinstance(value, Call):
        return f"an object of {value.name[:80]!a}"
    return f"a {type(value).__name__}"


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)


# --- statistics of mel bins ---


def read_statistics(path: Path) -> Tensor:
    """Return (2, bins) float32, mean and standard deviation of each mel bin, from an npy file: an array of that
    shape, or what MaskSpec saves, a pickled dict with "frame_mean" and "frame_std"
    (WangHelin1997/MaskSpec:audioset/get_mean_std.py)."""
    path = _followed(path)
    with storage.opened(path) as (file, _):
        content = file.read(MAX_BYTES + 1)
    try:
        array = _statistics(content)
    except (PickleError, AttributeError, LookupError, TypeError, ValueError) as error:
        damaged(path, f"holds no mean and standard deviation of mel bins ({_line(error)})")
    if array.ndim != 2 or len(array) != 2 or not np.isfinite(array).all() or not (array[1] >= 0).all():
        damaged(
            path, f"holds values of shape {array.shape[:8]}; expected finite (2, bins): means, deviations"
        )
    return torch.from_numpy(np.array(array, np.float32))


def _statistics(content: bytes) -> np.ndarray[Any, Any]:
    stream = BytesIO(content)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("another version of the npy format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream, _MAX_HEADER)
    if not dtype.hasobject:
        if dtype.str not in ("<f4", "<f8"):
            raise ValueError(f"values of type {dtype.str[:20]}")
        return np.frombuffer(stream.read(), dtype).reshape(shape)
    # an array of one object, which numpy pickles as (version, shape, type, Fortran order, [object])
    (saved,) = read_pickle(stream.read()).state[4]
    return np.stack([_pickled_array(saved[name]) for name in ("frame_mean", "frame_std")])


def _pickled_array(call: Call) -> np.ndarray[Any, Any]:
    """Return an array from the record of numpy's _reconstruct, with the same state."""
    _, shape, dtype, _, values = call.state
    if dtype.args[0] not in ("f4", "f8") or dtype.state[1] != "<" or not isinstance(values, bytes):
        raise ValueError("no array of floats")
    return np.frombuffer(values, f"<{dtype.args[0]}").reshape(shape)
