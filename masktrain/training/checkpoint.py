# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: written whole or not at all, read without trust, restored by name.

A checkpoint is a folder `step_00001000` (step: updates made) with
  <group>.safetensors   tensors: model, optimizer, and whatever else the run carries
  state.json            everything that is not a tensor
  manifest.json         {format, version, layout, step, files: {name: {size, sha256}}, sha256}, written last
`layout` "full" says that each file holds whole tensors.

Saving writes into a hidden folder beside it, forces every file and the folder to the disk, reads all of it
back and then renames: a process killed at any moment leaves the checkpoints before it as they were. A folder
whose manifest is absent or does not describe its files exactly is no checkpoint, and `latest` passes it over
by name. Removing renames first, too, so a folder of this name is never half removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from masktrain.errors import CheckpointError, RunError
from masktrain.training import storage
from masktrain.training.storage import FileRecord, damaged

FORMAT = "masktrain-checkpoint"
VERSION = 1
LAYOUT = "full"
MANIFEST = "manifest.json"
STATE = "state.json"

_FOLDER = re.compile(r"step_(\d{8,12})")
_LEFTOVER = re.compile(r"\.step_\d{8,12}\.[0-9a-f]{16}\.(partial|removed)")
_GROUP = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FILE = re.compile(r"[a-z][a-z0-9_]{0,63}\.safetensors|state\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")
_GROUP_OPTIONS = ("betas", "eps", "weight_decay")

Tensors = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. step: updates made. tensors: {group: {name: CPU tensor}}. data: state.json."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    data: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says. step: updates made. files: the record of every other file of the folder."""

    step: int
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class Latest:
    """checkpoint: the newest valid one, None where there is none. damaged: why each newer folder was passed
    over."""

    checkpoint: Checkpoint | None
    damaged: tuple[str, ...]


# --- saving ---


def save(root: Path, step: int, tensors: Tensors, data: Mapping[str, Any], keep_last: int) -> Path:
    """Write the checkpoint of `step` in `root`, remove all but the newest `keep_last`, return its folder.

    tensors: {group: {name: tensor}}, a file for each group, contiguous and sharing no memory. data: JSON-ready. A
    valid checkpoint of this step stays as it is (the same step of the same run holds the same state); a damaged one
    is replaced. Raises RunError when it cannot be written; all checkpoints there are untouched then.
    """
    for group in tensors:
        if not _GROUP.fullmatch(group):
            raise ValueError(f"save: group {group!r} is not a lower-case name")
    final = root / folder_name(step)
    partial = _hidden(final, "partial")
    try:
        if not root.is_dir():
            root.mkdir(parents=True)
            storage.sync(root.parent)
        if not _valid(final, step):
            try:
                _fill(partial, step, tensors, data)
                _put(partial, final, step)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            storage.sync(root)
        _prune(root, step, keep_last)
    except OSError as error:
        raise storage.write_failed(f"the checkpoint of step {step}", root, error) from error
    return final


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder of `step`."""
    return f"step_{step:08d}"


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.{kind}")


def _fill(folder: Path, step: int, tensors: Tensors, data: Mapping[str, Any]) -> None:
    folder.mkdir()
    for group, values in tensors.items():
        storage.write_tensors(folder / f"{group}.safetensors", dict(values))
    storage.write(folder / STATE, storage.encode_json(dict(data)))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "layout": LAYOUT,
        "step": step,
        "files": {name: asdict(storage.record_of(folder / name)) for name in sorted(os.listdir(folder))},
    }
    storage.write(folder / MANIFEST, storage.encode_json({**manifest, "sha256": _digest(manifest)}))
    storage.sync(folder)
    try:
        verify(folder)
    except CheckpointError as error:
        raise RunError(
            f"the checkpoint of step {step} reads back differently from what was written: {error} Check the "
            "disk; the checkpoints before it are untouched."
        ) from error


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _put(partial: Path, final: Path, step: int) -> None:
    """Give a complete folder its name, in the place of a damaged one.

    Where another process was first with a valid one, that one stays.
    """
    while True:
        try:
            return os.rename(partial, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if _valid(final, step):
            return None
        _remove(final)  # and if another process removed it meanwhile, try again


def _valid(folder: Path, step: int) -> bool:
    try:
        return verify(folder).step == step
    except CheckpointError:
        return False


def _remove(folder: Path) -> None:
    hidden = _hidden(folder, "removed")
    try:
        folder.rename(hidden)
    except FileNotFoundError:  # another process removed it
        return
    _delete(hidden)


def _delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _prune(root: Path, newest: int, keep_last: int) -> None:
    """Remove what is older than the `keep_last` newest sound checkpoints up to step `newest`."""
    kept = 0
    for step, folder in _listed(root):
        if step > newest:
            continue
        if kept >= keep_last:
            _remove(folder)
        elif _sound(folder):
            kept += 1


def _sound(folder: Path) -> bool:
    """Whether manifest and sizes are right: enough to count as kept, without reading all of it."""
    try:
        _manifest(folder)
    except CheckpointError:
        return False
    return True


def clean(root: Path) -> tuple[str, ...]:
    """Remove what killed saves left in `root` and return the names; for the start of the run that owns it."""
    try:
        names = sorted(n for n in os.listdir(root) if _LEFTOVER.fullmatch(n)) if root.is_dir() else []
        for name in names:
            _delete(root / name)
    except OSError as error:
        raise RunError(
            f"{root}: the rest of an interrupted save could not be removed ({error.strerror}). "
            "Make the folder writable."
        ) from error
    return tuple(names)


class AsyncSaver:
    """Saves in a background thread: `save` copies the tensors to the host and returns, and training goes on.

    One save is under way at a time: `save` waits for the one before. An error of the background surfaces as
    RunError from the next `save`, `check`, `wait` or `close`. The host copies are kept for the next save.
    """

    def __init__(self, root: Path, keep_last: int) -> None:
        self.root = root
        self.keep_last = keep_last
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._buffers: dict[str, dict[str, Tensor]] = {}

    def save(self, step: int, tensors: Tensors, data: Mapping[str, Any]) -> None:
        """Start saving the checkpoint of `step`; the caller may change tensors and data once this returns."""
        self.wait()
        frozen = json.loads(storage.encode_json(dict(data)))
        self._buffers = self._copy(tensors)
        # not a daemon: an interpreter that ends lets the save finish
        self._thread = threading.Thread(
            target=self._work, args=(step, self._buffers, frozen), name="checkpoint"
        )
        self._thread.start()

    def _copy(self, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
        out: dict[str, dict[str, Tensor]] = {}
        devices = set()
        for group, values in tensors.items():
            out[group] = {}
            for name, tensor in values.items():
                host = self._buffers.get(group, {}).get(name)
                if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                out[group][name] = host.copy_(tensor.detach(), non_blocking=True)
                if tensor.is_cuda:
                    devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return out

    def _work(self, step: int, tensors: Tensors, data: dict[str, Any]) -> None:
        try:
            save(self.root, step, tensors, data, self.keep_last)
        except BaseException as error:  # raised again in the thread that trains
            self._error = error

    def check(self) -> None:
        """Raise the error of a save that has failed, without waiting for one under way."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait for the save under way, raise its error, give the host copies back."""
        self._buffers = {}
        self.wait()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:  # otherwise the first error is the one to show
                raise


# --- reading ---


def latest(root: Path) -> Latest:
    """Load the newest valid checkpoint in `root`, and say which newer folders are damaged."""
    while True:
        passed: list[str] = []
        for step, folder in _listed(root):
            try:
                found = _load(folder)
                if found.step != step:
                    damaged(folder, "holds the checkpoint of another step")
            except CheckpointError as error:
                if not os.path.lexists(folder):
                    break  # the run that owns it removed it just now, after saving a newer one: look again
                passed.append(str(error))
            else:
                return Latest(found, tuple(passed))
        else:
            return Latest(None, tuple(passed))


def _listed(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of everything in `root` that is named as a checkpoint, newest first."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: the checkpoints cannot be listed ({error.strerror}).") from error
    steps = sorted((int(m[1]) for m in map(_FOLDER.fullmatch, names) if m), reverse=True)
    return [(step, root / folder_name(step)) for step in steps if folder_name(step) in names]


def verify(path: Path) -> Manifest:
    """Check manifest, size and SHA-256 of every file of a checkpoint, in constant memory. Raises CheckpointError."""
    manifest = _manifest(path)
    for name, record in manifest.files.items():
        if storage.record_of(path / name) != record:
            damaged(path / name, "is not what was written (its SHA-256 differs)")
    return manifest


def load(path: Path) -> Checkpoint:
    """Return a checkpoint; no file is looked into before its SHA-256 is right. Raises CheckpointError."""
    try:
        return _load(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Nothing of it is used: take another checkpoint of the run, or copy this one again."
        ) from error


def _load(path: Path) -> Checkpoint:
    manifest = verify(path)
    groups = sorted(manifest.files.keys() - {STATE})
    tensors = {name.removesuffix(".safetensors"): storage.read_tensors(path / name) for name in groups}
    return Checkpoint(path, manifest.step, tensors, storage.read_json(path / STATE))


def _manifest(path: Path) -> Manifest:
    """Return the manifest of a folder that holds exactly the files it lists, at the sizes it lists."""
    if os.path.islink(path) or not os.path.isdir(path):
        damaged(path, "is not a checkpoint folder")
    file_path = path / MANIFEST
    content = storage.read_json(file_path)
    if content.get("format") != FORMAT:
        damaged(file_path, f"is not the manifest of a {FORMAT}")
    version, layout = content.get("version"), content.get("layout")
    if version != VERSION or layout != LAYOUT:
        damaged(
            file_path,
            f"is of version {str(version)[:20]}, layout {str(layout)[:20]}; this masktrain reads version "
            f"{VERSION}, layout {LAYOUT}",
        )
    step, files = content.get("step"), content.get("files")
    if content.keys() != {"format", "version", "layout", "step", "files", "sha256"} or not _is_count(step):
        damaged(file_path, "has other fields than a manifest has")
    if content.pop("sha256") != _digest(content):
        damaged(file_path, "is not what was written (its SHA-256 differs)")
    if not isinstance(files, dict) or STATE not in files:
        damaged(file_path, f"does not list {STATE}")
    records = {name: _record(file_path, name, entry) for name, entry in files.items()}
    _check_folder(path, records)
    return Manifest(step, records)


def _record(path: Path, name: str, entry: Any) -> FileRecord:
    if not _FILE.fullmatch(name):
        damaged(path, f"lists {name[:80]!r}, which is no file of a checkpoint")
    if not isinstance(entry, dict) or entry.keys() != {"size", "sha256"}:
        damaged(path, f"has a wrong entry for {name}")
    size, digest = entry["size"], entry["sha256"]
    if not _is_count(size) or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        damaged(path, f"has a wrong entry for {name}")
    return FileRecord(size, digest)


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 48


def _check_folder(path: Path, records: dict[str, FileRecord]) -> None:
    try:
        names = set(os.listdir(path))
    except OSError as error:
        damaged(path, f"cannot be listed ({error.strerror})")
    extra = sorted(names - records.keys() - {MANIFEST})
    if extra:
        damaged(path, f"holds files that its manifest does not list: {', '.join(map(repr, extra[:5]))}")
    for name, record in records.items():
        with storage.opened(path / name) as (_, size):
            if size != record.size:
                damaged(path / name, f"has {size} bytes where {record.size} were written")


# --- model and optimiser by name ---


def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model's parameters and persistent buffers, bit for bit.

    Every name, shape and dtype has to agree; all that do not are in one CheckpointError, and nothing is
    changed then.
    """
    own = model.state_dict()
    problems = _differences(own, tensors)
    if problems:
        raise CheckpointError(_listing("the weights do not fit this model", problems))
    model.load_state_dict(dict(tensors))


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return the state of an AdamW built from named parameters, as tensors and JSON.

    Tensors: "exp_avg.<parameter>", "exp_avg_sq.<parameter>", "step.<parameter>", for each parameter that has
    had an update yet. JSON: the groups, with the names of their parameters.
    """
    tensors = {
        f"{key}.{name}": optimizer.state[parameter][key]
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key in _ADAM_STATE
        if optimizer.state.get(parameter)
    }
    return tensors, [_group_json(group) for group in optimizer.param_groups]


def _group_json(group: dict[str, Any]) -> dict[str, Any]:
    options = {key: list(v) if isinstance(v := group[key], tuple) else v for key in _GROUP_OPTIONS}
    return {"name": group["name"], "lr": group["lr"], **options, "params": list(group["param_names"])}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], groups: list[dict[str, Any]]
) -> None:
    """Restore what `optimizer_state` returned, bit for bit, into an optimiser of the same parameters and
    options.

    All differences are in one CheckpointError, and nothing is changed then.
    """
    named = {
        name: (parameter, group)
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }
    present = {key.partition(".")[2] for key in tensors}
    expected = {}
    for name in named.keys() & present:
        parameter = named[name][0]
        expected[f"step.{name}"] = torch.empty((), dtype=torch.float32)
        expected[f"exp_avg.{name}"] = expected[f"exp_avg_sq.{name}"] = parameter
    problems = _group_differences(optimizer, groups) + _differences(expected, tensors)
    if problems:
        raise CheckpointError(_listing("the optimiser state does not fit this model", problems))
    optimizer.state.clear()
    for name in present:
        parameter, group = named[name]
        on_device = group["fused"] or group["capturable"]
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].to(
                parameter.device if on_device or key != "step" else "cpu", copy=True
            )
            for key in _ADAM_STATE
        }
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = saved["lr"]


def _group_differences(optimizer: torch.optim.Optimizer, groups: Any) -> list[str]:
    own = [_group_json(group) for group in optimizer.param_groups]
    if not isinstance(groups, list) or len(groups) != len(own):
        return [f"{len(own)} parameter groups are needed"]
    problems = []
    for mine, theirs in zip(own, groups, strict=True):
        if not isinstance(theirs, dict) or theirs.keys() != mine.keys():
            problems.append(f"group {mine['name']}: it has other fields")
            continue
        problems += [
            f"group {mine['name']}: {key} differs" for key in mine if key != "lr" and mine[key] != theirs[key]
        ]
        if type(theirs["lr"]) not in (int, float):
            problems.append(f"group {mine['name']}: lr is no number")
    return problems


def _differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    problems = [f"missing: {name!r}" for name in sorted(own.keys() - other.keys())]
    problems += [f"unexpected: {name!r}" for name in sorted(other.keys() - own.keys())]
    for name in sorted(own.keys() & other.keys()):
        mine, theirs = own[name], other[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            problems.append(
                f"{name!r}: expected {tuple(mine.shape)} {mine.dtype}, received {tuple(theirs.shape)} "
                f"{theirs.dtype}"
            )
    return problems


def _listing(what: str, problems: list[str]) -> str:
    shown = "; ".join(problems[:20])
    more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    return f"{what}. {shown}{more}. Was the checkpoint written by another recipe, size or version?"
