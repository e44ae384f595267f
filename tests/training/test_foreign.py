# SPDX-License-Identifier: Apache-2.0
"""Files of other programs: what torch, numpy and safetensors write is read as they read it; all else is refused.

Refused means CheckpointError: nothing runs, nothing is written beside the file, no memory is taken for what a file
only announces.
"""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from masktrain.errors import CheckpointError
from masktrain.training.foreign import read_statistics, read_weights

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def tensors() -> dict[str, torch.Tensor]:
    """Tensors of every type, and of every form that a state dict may hold."""
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    return {
        **{f"t.{d}".replace("torch.", ""): (3 * torch.randn(2, 3)).to(d) for d in DTYPES},
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "shared": base,
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(a.contiguous().view(-1).view(torch.uint8).numpy()) == bytes(b.contiguous().view(-1).view(torch.uint8).numpy())  # fmt: skip


WRAPS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda s: s,
    "ordered": collections.OrderedDict,
    "mae": lambda s: {
        "model": s,
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
        "epoch": 3,
        "args": argparse.Namespace(lr=1e-3, model="mae_vit_base", device=torch.device("cpu")),
        "best": np.float64(0.5),
    },
    "lightning": lambda s: {"state_dict": s, "callbacks": {Path: 1}},
    "data parallel": lambda s: {f"module.{name}": tensor for name, tensor in s.items()},
    "parameters": lambda s: {
        n: torch.nn.Parameter(t, requires_grad=False) if t.is_floating_point() else t for n, t in s.items()
    },
}


@pytest.mark.parametrize("wrap", WRAPS)
def test_torch_files(tmp_path: Path, wrap: str) -> None:
    path, expected = tmp_path / "w.pth", tensors()
    torch.save(WRAPS[wrap](expected), path)
    got = read_weights(path)
    assert got.state.keys() == expected.keys() and not got.others
    for name, tensor in got.state.items():
        assert same(tensor, expected[name]), name
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_module_s_own_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "w.pt")
    got = read_weights(tmp_path / "w.pt").state
    assert all(torch.equal(got[name], tensor) for name, tensor in model.state_dict().items())


def test_safetensors_and_npz(tmp_path: Path) -> None:
    expected = {n: t.clone().contiguous() for n, t in tensors().items()}
    safetensors.torch.save_file(expected, tmp_path / "w.safetensors")
    got = read_weights(tmp_path / "w.safetensors").state
    assert got.keys() == expected.keys() and all(same(got[n], t) for n, t in expected.items())
    numbers = {n: t.numpy() for n, t in expected.items() if t.dtype != torch.bfloat16}
    numbers["fortran"] = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    for save, name in ((np.savez, "a.npz"), (np.savez_compressed, "b.npz")):
        save(tmp_path / name, **numbers)
        read = read_weights(tmp_path / name).state
        assert read.keys() == numbers.keys()
        assert all(same(read[n], torch.from_numpy(np.ascontiguousarray(v).reshape(v.shape))) for n, v in numbers.items())  # fmt: skip


def test_the_form_is_told_by_the_content(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").state.keys() == {"w"}


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "w.pth").symlink_to(tmp_path / "blob")
    assert read_weights(tmp_path / "w.pth").state.keys() == {"w"}


def test_what_stands_among_weights_is_named(tmp_path: Path) -> None:
    state = {
        "w": torch.ones(2),
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.ones(2),
        "number": 3,
        "text": "x",
        "space": argparse.Namespace(),
    }
    torch.save(state, tmp_path / "w.pth")
    got = read_weights(tmp_path / "w.pth")
    assert got.state.keys() == {"w", "complex"}
    assert "_rebuild_sparse_tensor" in got.others["sparse"]
    assert got.others["number"] == "a int" and "Namespace" in got.others["space"]


def test_types_that_no_weight_has(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex64)}, tmp_path / "w.pth")
    assert "ComplexFloatStorage" in refused(tmp_path / "w.pth")


# --- hostile ---


def refused(path: Path) -> str:
    """Check that a file is not read, leaves no trace and takes little memory; return the message."""
    before = sorted(path.parent.rglob("*"))
    tracemalloc.start()
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    size = path.stat().st_size if path.is_file() else 0
    assert tracemalloc.get_traced_memory()[1] < (16 << 20) + 4 * min(size, 1 << 28)
    tracemalloc.stop()
    assert sorted(path.parent.rglob("*")) == before
    text = str(caught.value)
    assert str(path.name) in text and len(text) < 600 and text.isprintable()
    return text


class Bomb:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


BOMBS: dict[str, Callable[[Path], Any]] = {
    "root": lambda m: Bomb(os.mkdir, str(m)),
    "system": lambda m: {"w": Bomb(os.system, f"mkdir {m}")},
    "eval": lambda m: {"model": {"w": Bomb(eval, f"__import__('os').mkdir({str(m)!r})")}},
    "beside weights": lambda m: {"model": {"w": torch.ones(2)}, "args": Bomb(os.mkdir, str(m))},
    "in a tensor": lambda m: {"w": torch.ones(2), "x": Bomb(os.mkdir, str(m))},
}


@pytest.mark.parametrize("kind", BOMBS)
def test_pickles_run_nothing(tmp_path: Path, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / "w.pth"
    torch.save(BOMBS[kind](marker), path)
    if kind in ("beside weights", "in a tensor"):
        assert read_weights(path).state.keys() == {"w"}
    else:
        refused(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # the payload does work


def test_plain_and_old_pickles_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(Bomb(os.mkdir, str(marker))))
    torch.save({"w": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.pkl", "old.pth"):
        assert "plain pickle" in refused(tmp_path / name)
    assert not marker.exists()


def rewrite(
    path: Path, change: Callable[[dict[str, bytes]], object], compress: int = zipfile.ZIP_STORED
) -> None:
    """Change the members of a zip file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", compress) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def saved(path: Path, **state: torch.Tensor) -> Path:
    torch.save(state or {"w": torch.arange(6.0).reshape(2, 3)}, path)
    return path


def pickled(members: dict[str, bytes]) -> str:
    return next(name for name in members if name.endswith("data.pkl"))


def tensor_pickle(
    offset: Any = 0,
    shape: Any = (2, 3),
    stride: Any = (3, 1),
    key: Any = "0",
    numel: Any = 6,
    kind: str = "FloatStorage",
) -> bytes:
    """The pickle of {"w": a tensor} that says this of it."""

    class Rebuilt:
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (Stored(), offset, shape, stride, False, None)

    class Stored:
        pass

    class Writer(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", getattr(torch, kind), key, "cpu", numel) if isinstance(value, Stored) else None

    stream = io.BytesIO()
    Writer(stream, 2).dump({"w": Rebuilt()})
    return stream.getvalue()


def test_a_handmade_pickle_is_read(tmp_path: Path) -> None:
    """So that the refusals below are of what they change."""
    path = saved(tmp_path / "w.pth")
    rewrite(path, lambda m: m.update({pickled(m): tensor_pickle()}))
    assert torch.equal(read_weights(path).state["w"], torch.arange(6.0).reshape(2, 3))


TENSORS: dict[str, dict[str, Any]] = {
    "larger than its values": {"shape": (3, 3)},
    "overflow": {"shape": (1 << 40, 1 << 40), "stride": (1, 1)},
    "expanded": {"shape": (1 << 20, 1 << 20), "stride": (0, 0)},
    "expanded a little": {"shape": (7,), "stride": (0,)},
    "offset": {"offset": 1},
    "far offset": {"offset": 1 << 61},
    "negative offset": {"offset": -1},
    "negative size": {"shape": (-2, -3)},
    "negative stride": {"stride": (-3, 1)},
    "other rank": {"stride": (1,)},
    "float": {"shape": (2.0, 3)},
    "bool": {"offset": True},
    "list": {"shape": [2, 3]},
    "none": {"shape": None},
    "huge": {"shape": (10**40,), "stride": (1,)},
    "numel": {"numel": 7},
    "numel that fits nothing": {"numel": 1 << 60},
    "numel text": {"numel": "6"},
    "numel negative": {"numel": -6},
    "key": {"key": "1"},
    "key up": {"key": "../data.pkl"},
    "key number": {"key": 0},
    "key root": {"key": "/etc/passwd"},
    "type": {"kind": "DoubleStorage"},
    "quantised": {"kind": "QInt8Storage"},
    "no storage": {"kind": "nn"},
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_contradict_their_bytes(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "w.pth")
    if TENSORS[kind].get("kind") == "nn":
        content = tensor_pickle().replace(b"ctorch\nFloatStorage", b"cos\nsystem")
    else:
        content = tensor_pickle(**TENSORS[kind])
    rewrite(path, lambda m: m.update({pickled(m): content}))
    assert "'w'" in refused(path)


def other_pickle(content: bytes) -> Callable[[dict[str, bytes]], object]:
    return lambda m: m.update({pickled(m): content})


ZIPS: dict[str, Callable[[dict[str, bytes]], object]] = {
    "no values": lambda m: m.pop("w/data/0"),
    "short values": lambda m: m.update({"w/data/0": b"\0" * 23}),
    "long values": lambda m: m.update({"w/data/0": b"\0" * 25}),
    "two pickles": lambda m: m.update({"other/data.pkl": m[pickled(m)]}),
    "no pickle": lambda m: m.pop(pickled(m)),
    "empty pickle": other_pickle(b""),
    "other bytes": other_pickle(b"\xff" * 50),
    "no dict": other_pickle(pickle.dumps([1, 2], 2)),
    "empty dict": other_pickle(pickle.dumps({}, 2)),
    "no tensor": other_pickle(pickle.dumps({"model": {"a": 1}, "\n\x1b[31m": 2}, 2)),
    "module": other_pickle(b"\x80\x02ctorch.nn\nLinear\n)\x81}b."),
    "cyclic": other_pickle(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."),
    "endless": other_pickle(b"]" * (1 << 16)),
    "over the limit": other_pickle(b"N" * ((16 << 20) + 1)),
    "big-endian": lambda m: m.update({"w/byteorder": b"big"}),
    "empty": lambda m: m.clear(),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ZIPS)
def test_zip_files_that_no_torch_writes(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path / "w.pth")
    rewrite(path, ZIPS[kind])
    refused(path)


def test_members_that_point_outside_are_never_written(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth")
    rewrite(path, lambda m: m.update({"../../outside": b"x", "/tmp/../outside": b"x"}))
    assert read_weights(path).state.keys() == {"w"}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["w.pth"]


def test_names_of_tensors(tmp_path: Path) -> None:
    for name in ("a\nb", "\x1b[31m", "\ud800", "x" * 300, "é"):
        path = tmp_path / "w.pth"
        torch.save({name: torch.ones(2)}, path)
        assert "names a tensor" in refused(path)


def test_compressed_bombs(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth")
    zeros = torch.zeros(64 << 20, dtype=torch.uint8)
    rewrite(path, lambda m: m.update({"w/data/0": bytes(zeros.numpy())}), zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(path)
    with zipfile.ZipFile(tmp_path / "w.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"{i}.npy", bytes(32 << 20))
    assert "unpack" in refused(tmp_path / "w.npz")


def test_members_over_each_other(tmp_path: Path) -> None:
    """A directory that lists the same bytes many times, each under another name."""
    path = saved(tmp_path / "w.pth", w=torch.zeros(1 << 16))
    content = bytearray(path.read_bytes())
    end = content.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack_from("<HII", content, end + 10)
    entries = bytes(content[start : start + size])
    at = entries.index(b"w/data/0") - 46
    entry = entries[at : at + 46 + sum(struct.unpack_from("<HHH", entries, at + 28))]
    more = b"".join(entry.replace(b"w/data/0", b"w/data/%c" % c) for c in b"123456789")
    tail = bytearray(content[end:])
    struct.pack_into("<HHII", tail, 8, count + 9, count + 9, size + len(more), start)
    path.write_bytes(bytes(content[:start]) + entries + more + bytes(tail))
    assert len(zipfile.ZipFile(path).namelist()) == count + 9
    assert "overlap" in refused(path)


def test_two_members_of_one_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("w/data/0", b"\0" * 24)
    assert "one name" in refused(path)


def npy(header: bytes, values: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + values


ARRAYS = {
    "object": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': ()}\n", pickle.dumps(Bomb(os.mkdir, "marker"))),
    "huge": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}\n"),
    "negative": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}\n", bytes(4)),
    "short": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}\n", bytes(7)),
    "text": npy(b"{'descr': '<U3', 'fortran_order': False, 'shape': (1,)}\n", bytes(12)),
    "records": npy(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}\n", bytes(4)),
    "code": npy(b"__import__('os').mkdir('marker')\n"),
    "deep": npy(b"(" * 5000 + b")" * 5000),
    "long header": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}" + b" " * 60000 + b"\n", bytes(4)),
    "other version": b"\x93NUMPY\x09\x00" + bytes(64),
    "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_that_no_weight_is(tmp_path: Path, kind: str) -> None:
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("a.npy", ARRAYS[kind])
    refused(tmp_path / "w.npz")


def test_encrypted_and_unknown_members(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth")
    good = path.read_bytes()
    for what, value in ((6, 1), (8, 99)):  # flags: encrypted; method: unknown
        content = bytearray(good)
        for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
            at = content.find(signature)
            while at >= 0:
                struct.pack_into("<H", content, at + shift + what, value)
                at = content.find(signature, at + 4)
        path.write_bytes(content)
        refused(path)


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text").write_text("weights, weights, and more weights")
    (tmp_path / "zip").write_bytes(b"PK\x03\x04")
    (tmp_path / "json").write_text('{"a": 1, "b": 2, "c": 3}')
    (tmp_path / "zeros").write_bytes(bytes(1000))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("absent", "folder", "empty", "text", "zip", "json", "zeros", "pipe"):
        refused(tmp_path / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_weights(tmp_path / "device")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(CheckpointError):
        read_weights(tmp_path / "loop")
    with pytest.raises(CheckpointError):
        read_weights(Path("\0"))


@pytest.mark.parametrize("form", ["pth", "npz", "safetensors"])
def test_damaged_files_are_refused_or_read(tmp_path: Path, form: str) -> None:
    """Cut anywhere, or with any bytes changed: tensors, or CheckpointError, and nothing else."""
    path = tmp_path / f"w.{form}"
    state = {"a": torch.arange(6.0), "b": torch.ones(2, 3).half()}
    if form == "pth":
        torch.save({"model": state, "args": argparse.Namespace(x=1)}, path)
    elif form == "npz":
        np.savez_compressed(path, **{n: t.numpy() for n, t in state.items()})
    else:
        safetensors.torch.save_file(state, path)
    good = path.read_bytes()
    rng = random.Random(form)
    for number in range(400):
        if number % 4 == 0:
            path.write_bytes(good[: rng.randrange(len(good))])
        else:
            bad = bytearray(good)
            for _ in range(rng.randint(1, 5)):
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            path.write_bytes(bad)
        try:
            read_weights(path)
        except CheckpointError as error:
            assert len(str(error)) < 600


# --- statistics of mel bins ---


def test_statistics(tmp_path: Path) -> None:
    mean, std = np.linspace(-1, 1, 128).astype(np.float32), np.linspace(0.1, 1, 128).astype(np.float32)
    expected = torch.from_numpy(np.stack([mean, std]))
    np.save(tmp_path / "plain.npy", np.stack([mean, std]))
    published = {"all_mean": np.float32(0.5), "all_std": 1.0, "frame_mean": mean, "frame_std": std}
    np.save(tmp_path / "maskspec.npy", published, allow_pickle=True)  # type: ignore[arg-type]
    np.save(tmp_path / "double.npy", {k: np.float64(v) for k, v in published.items()}, allow_pickle=True)  # type: ignore[arg-type]
    for name in ("plain", "maskspec", "double"):
        assert torch.equal(read_statistics(tmp_path / f"{name}.npy"), expected), name


def test_statistics_that_are_none(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    contents: dict[str, Any] = {
        "shape": np.ones((3, 4)),
        "negative": np.array([[1.0], [-1.0]]),
        "nan": np.array([[np.nan], [1.0]]),
        "whole": np.ones((2, 4), np.int64),
        "bomb": Bomb(os.mkdir, str(marker)),
        "bomb inside": {"frame_mean": Bomb(os.mkdir, str(marker)), "frame_std": np.ones(4)},
        "other": {"mean": np.ones(4)},
        "objects": {"frame_mean": np.array([None]), "frame_std": np.array([None])},
        "list": [1, 2],
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}.npy"
        np.save(path, np.array(content, object) if "bomb" in name else content, allow_pickle=True)
        with pytest.raises(CheckpointError):
            read_statistics(path)
    for name, raw in (("empty", b""), ("text", b"x" * 100), ("huge", npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1099511627776)}\n"))):  # fmt: skip
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(CheckpointError):
            read_statistics(tmp_path / name)
    assert not marker.exists()
