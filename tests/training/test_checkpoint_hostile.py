# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile checkpoints: each ends in CheckpointError, runs nothing and hangs nowhere."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.errors import CheckpointError
from masktrain.training.checkpoint import latest, load, save, verify

FILES = ["manifest.json", "state.json", "model.safetensors", "optimizer.safetensors"]
TENSORS = {
    "model": {"w": torch.arange(12.0).reshape(3, 4), "flag": torch.tensor([True, False])},
    "optimizer": {"step.w": torch.tensor(7.0)},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A checkpoint of step 7, with a good one of step 6 before it."""
    save(tmp_path, 6, TENSORS, {"seed": 1}, keep_last=9)
    return save(tmp_path, 7, TENSORS, {"seed": 1, "nested": {"a": [1, 2.5, None]}}, keep_last=9)


def refused(path: Path) -> str:
    """Check that `path` is not read and that the checkpoint before it serves; return the message."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    found = latest(path.parent).checkpoint
    assert found is not None and found.step == 6
    return str(caught.value)


def sign(manifest: dict[str, Any]) -> None:
    """Give a forged manifest the digest that belongs to it."""
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and sign it."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    sign(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def forge(path: Path, name: str, content: bytes) -> None:
    """Replace a file so that size and SHA-256 of the manifest agree with it."""
    (path / name).write_bytes(content)
    record = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit(path, lambda manifest: manifest["files"].update({name: record}))


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


def bombs(marker: Path, folder: Path) -> dict[str, bytes]:
    """The same payload as a plain pickle, as torch's zip format and as its older format."""
    out = {"pickle": pickle.dumps(Bomb(marker))}
    for name, zipped in (("zip", True), ("legacy", False)):
        torch.save({"w": Bomb(marker)}, folder / name, _use_new_zipfile_serialization=zipped)
        out[name] = (folder / name).read_bytes()
    return out


@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
@pytest.mark.parametrize("kind", ["pickle", "zip", "legacy"])
@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_each_file(
    path: Path, tmp_path_factory: pytest.TempPathFactory, name: str, kind: str, signed: bool
) -> None:
    marker = path.parent / "marker"
    content = bombs(marker, tmp_path_factory.mktemp("bombs"))[kind]
    if name == "manifest.json" or not signed:
        (path / name).write_bytes(content)
    else:
        forge(path, name, content)
    refused(path)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists()  # the payload does work


def test_the_code_never_mentions_pickle_or_torch_load() -> None:
    from masktrain.training import checkpoint, storage

    for module in (checkpoint, storage):
        text = Path(str(module.__file__)).read_text().replace("safetensors.torch.load", "")
        assert "pickle" not in text and "torch.load" not in text and "marshal" not in text


@pytest.mark.parametrize("name", FILES)
def test_every_bit_matters(path: Path, name: str) -> None:
    file = path / name
    good = file.read_bytes()
    rng = random.Random(name)
    for position in rng.sample(range(8 * len(good)), min(200, 8 * len(good))):
        bad = bytearray(good)
        bad[position // 8] ^= 1 << position % 8
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load(path)
    file.write_bytes(good)
    assert verify(path).step == 7


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_extension(path: Path, name: str) -> None:
    file = path / name
    good = file.read_bytes()
    for length in {*range(0, len(good), 7), len(good) - 1}:
        file.write_bytes(good[:length])
        with pytest.raises(CheckpointError):
            load(path)
    for extra in (b"\0", b"x" * 100):
        file.write_bytes(good + extra)
        refused(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(path: Path, name: str) -> None:
    (path / name).unlink()
    assert name in refused(path)


@pytest.mark.parametrize("name", ["extra.safetensors", "data.pkl", ".metadata", "sub"])
def test_an_extra_file(path: Path, name: str) -> None:
    if name == "sub":
        (path / name).mkdir()
    else:
        (path / name).write_bytes(b"")
    assert name in refused(path)


@pytest.mark.parametrize("name", FILES)
def test_links_folders_pipes_and_devices_in_place_of_each_file(path: Path, name: str) -> None:
    file, elsewhere = path / name, path.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert "link" in refused(path)
    file.unlink()
    file.mkdir()
    refused(path)
    file.rmdir()
    os.mkfifo(file)
    assert "not a regular file" in refused(path)
    file.unlink()
    file.symlink_to("/dev/zero")
    assert "link" in refused(path)


def test_a_link_in_place_of_the_folder(path: Path) -> None:
    path.rename(path.parent / "moved")
    path.symlink_to(path.parent / "moved")
    refused(path)


NAMES = ["../step_00000006/state.json", "/etc/passwd", "a/b.safetensors", "..", ".", "", "manifest.json"]
NAMES += [
    "model.pkl",
    "model.safetensors\n",
    "model.safetensors\0",
    ".hidden.safetensors",
    "\ud800.json",
    "x" * 9999,
]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_that_a_manifest_may_not_list(path: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = manifest["files"]["state.json"]

    edit(path, change)
    text = refused(path)
    assert "no file of a checkpoint" in text and len(text) < 500


ENTRIES: list[Any] = [
    None,
    5,
    [],
    {},
    {"size": 1},
    {"size": -1, "sha256": "0" * 64},
    {"size": True, "sha256": "0" * 64},
]
ENTRIES += [
    {"size": 1 << 60, "sha256": "0" * 64},
    {"size": 1.0, "sha256": "0" * 64},
    {"size": 5, "sha256": "0" * 63},
]
ENTRIES += [
    {"size": 5, "sha256": 7},
    {"size": 5, "sha256": "0" * 64, "more": 1},
    {"size": 10**400, "sha256": "0" * 64},
]


@pytest.mark.parametrize("entry", ENTRIES, ids=range(len(ENTRIES)))
def test_entries_that_a_manifest_may_not_hold(path: Path, entry: object) -> None:
    edit(path, lambda manifest: manifest["files"].update({"model.safetensors": entry}))
    refused(path)


FIELDS: list[dict[str, Any]] = [{"format": "other"}, {"version": 2}, {"version": None}, {"layout": "sharded"}]
FIELDS += [
    {"layout": [[["x" * 10_000]]]},
    {"step": -1},
    {"step": "7"},
    {"step": 7.0},
    {"step": True},
    {"step": 1 << 70},
]
FIELDS += [{"files": []}, {"files": {}}, {"files": None}, {"more": 1}]


@pytest.mark.parametrize("fields", FIELDS, ids=range(len(FIELDS)))
def test_fields_that_a_manifest_may_not_hold(path: Path, fields: dict[str, Any]) -> None:
    edit(path, lambda manifest: manifest.update(fields))
    assert len(refused(path)) < 600


def test_another_version_is_named(path: Path) -> None:
    edit(path, lambda manifest: manifest.update(version=9))
    text = refused(path)
    assert "version 9" in text and "reads version 1" in text


JSON = {
    "nan": b'{"seed": NaN}',
    "infinity": b'{"seed": -Infinity}',
    "overflow": b'{"seed": 1e999}',
    "deep lists": b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    "very deep": b'{"a": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    "deep objects": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "unclosed": b"[" * 1_000_000,
    "digits": b'{"a": ' + b"9" * 100_000 + b"}",
    "utf-8": b'{"a": "\xff"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "list": b"[1, 2]",
    "number": b"7",
    "empty": b"",
    "zeros": b"\0" * 64,
    "two": b"{} {}",
    "backslashes": b'{"a": "' + b"\\" * 200_001,
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["state.json", "manifest.json", "header"])
@pytest.mark.parametrize("kind", JSON)
def test_json_that_is_none(path: Path, name: str, kind: str) -> None:
    content = JSON[kind]
    if name == "manifest.json":
        (path / name).write_bytes(content)
    elif name == "state.json":
        forge(path, name, content)
    else:
        forge(path, "model.safetensors", len(content).to_bytes(8, "little") + content)
    assert len(refused(path)) < 500


def test_absurd_sizes(path: Path) -> None:
    """Sparse files of a terabyte, and headers that announce more than there is."""
    with open(path / "manifest.json", "r+b") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    assert "more than" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def header(**entry: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}}


HEADERS: dict[str, tuple[dict[str, Any], int]] = {
    "dtype": (header(dtype="X"), 8),
    "dtype that torch lacks": (header(dtype="F8_E8M0", shape=[8]), 8),
    "negative shape": (header(shape=[-1, -2]), 8),
    "shape too large": (header(shape=[3]), 8),
    "shape overflow": (header(shape=[1 << 62, 4], data_offsets=[0, 0]), 0),
    "zero hides overflow": (header(shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0]), 0),
    "offset past the end": (header(shape=[4], data_offsets=[0, 16]), 8),
    "offsets reversed": (header(data_offsets=[8, 0]), 8),
    "gap at the start": (header(data_offsets=[8, 16]), 16),
    "bytes left over": (header(), 12),
    "overlap": ({**header(), "b": header()["a"]}, 8),
    "missing key": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "long name": ({"x" * 100_000: {"dtype": "F32"}}, 8),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_tensor_headers_that_contradict_themselves(path: Path, kind: str) -> None:
    entries, size = HEADERS[kind]
    encoded = json.dumps(entries).encode()
    forge(path, "model.safetensors", len(encoded).to_bytes(8, "little") + encoded + b"\0" * size)
    text = refused(path)
    assert "safetensors format" in text and len(text) < 600


@pytest.mark.parametrize("length", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_absurd_header_lengths(path: Path, length: int) -> None:
    forge(path, "model.safetensors", length.to_bytes(8, "little") + b'{"a":1}' + b" " * 100)
    assert "safetensors format" in refused(path)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
entry_like = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | json_values,
    }
)


@settings(max_examples=60, deadline=None)
@given(
    entries=st.dictionaries(st.text(max_size=5), entry_like | json_values, max_size=3) | json_values,
    payload=st.binary(max_size=64),
    raw=st.none() | st.binary(max_size=80),
)
def test_any_signed_content_is_refused_or_read(
    entries: object, payload: bytes, raw: bytes | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever stands in a file whose hash is right: tensors that its bytes cover, or CheckpointError."""
    root = tmp_path_factory.mktemp("fuzz")
    path = save(root, 7, {"model": {}}, {}, keep_last=1)
    encoded = json.dumps(entries).encode()
    content = raw if raw is not None else len(encoded).to_bytes(8, "little") + encoded + payload
    forge(path, "model.safetensors", content)
    try:
        tensors = load(path).tensors["model"]
    except CheckpointError:
        pass
    else:
        assert sum(t.numel() * t.element_size() for t in tensors.values()) <= len(content)
    shutil.rmtree(root)


@settings(max_examples=60, deadline=None)
@given(
    content=json_values
    | st.dictionaries(st.sampled_from(["format", "version", "files", "step"]), json_values)
)
def test_any_manifest_is_refused(content: object, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    path = save(root, 7, {"model": {}}, {}, keep_last=1)
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        load(path)
    assert latest(root).checkpoint is None
    shutil.rmtree(root)


def test_what_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (
        tmp_path / "absent",
        tmp_path / "file",
        tmp_path / "file" / "below",
        Path("/dev/null"),
        Path("\0"),
    ):
        with pytest.raises(CheckpointError, match="not a checkpoint folder"):
            load(path)


def test_messages_say_what_to_do(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError) as caught:
        load(path)
    text = str(caught.value)
    assert str(path / "model.safetensors") in text and "1 bytes" in text and "take another checkpoint" in text
