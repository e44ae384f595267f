# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: made or refused, locked against a second process, and its JSON files.

config.json  env.json  summary.json  metrics.jsonl  tb/  checkpoints/  pictures/
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import masktrain
from masktrain.errors import ConfigError, MasktrainError
from masktrain.kernels._dispatch import Choice
from masktrain.training.storage import encode_json, write_atomic

CONFIG = "config.json"
LOCK = ".lock"
PACKAGES = (
    "torch",
    "numpy",
    "soundfile",
    "triton",
    "safetensors",
    "tensorboard",
    "matplotlib",
    "tyro",
    "rich",
)

# what a file system without locks answers: then nothing guards the folder, and the run says so
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# folders that this process has locked: the system's lock is one per process, and closing any handle drops it
_held: set[Path] = set()


def default_out(recipe: str, now: datetime, root: Path = Path("runs")) -> Path:
    """Return runs/<recipe>_<date>_<time>, with a number behind it where that is taken."""
    name = f"{recipe}_{now:%Y-%m-%d_%H-%M-%S}"
    candidates = (root / (name if n == 1 else f"{name}_{n}") for n in range(1, 10_000))
    return next(path for path in candidates if not path.exists())


class RunDir:
    """The folder of one run, held by this process until `close`. For the first rank only.

    Use `create` for a new run and `reopen` for one that is resumed. note: what the user should know of the
    folder (its file system has no locks), or None.
    """

    def __init__(self, path: Path, option: str) -> None:
        """Lock an existing folder. option: what the user named it with, for messages."""
        self.path = path
        self.config = path / CONFIG
        self.env = path / "env.json"
        self.summary = path / "summary.json"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tb"
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"
        self.note: str | None = None
        self._key = path.resolve()
        self._lock = self._take_lock(option)

    @classmethod
    def create(cls, path: Path) -> RunDir:
        """Make the folder of a new run and lock it.

        Raises ConfigError where the folder holds something already, is in use, or cannot be made or written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            _check_empty(path)
        except OSError as error:
            raise _unusable("--out", path, error) from error
        run = cls(path, "--out")
        try:
            _check_empty(path)  # again: before the lock, another process may have started its run here
        except MasktrainError:
            run.close()
            raise
        return run

    @classmethod
    def reopen(cls, path: Path) -> RunDir:
        """Lock the folder of a run that is to be resumed. Raises ConfigError where there is none or it is in
        use."""
        try:
            found = path.is_dir()
            has_run = (path / CONFIG).is_file()
        except OSError as error:
            raise _unusable("--resume", path, error) from error
        if not found:
            raise ConfigError(f"--resume {path}: no such folder. Name the folder of a run.")
        if not has_run:
            raise ConfigError(f"--resume {path}: holds no {CONFIG}, so no run was started there.")
        return cls(path, "--resume")

    def _take_lock(self, option: str) -> int:
        if self._key in _held:
            raise ConfigError(f"{option} {self.path}: this process already writes a run there.")
        lock = -1
        try:
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            # a POSIX lock: it goes when the process does, even while children that it forked live on
            self._lock_file(lock, option)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            os.close(lock) if lock >= 0 else None
            raise _unusable(option, self.path, error) from error
        except ConfigError:
            os.close(lock)
            raise
        _held.add(self._key)
        return lock

    def _lock_file(self, lock: int, option: str) -> None:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
                raise ConfigError(
                    f"{option} {self.path}: {owner} is writing this run now. Wait until it has ended, stop "
                    "it, or choose another --out."
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            self.note = (
                f"The file system of {self.path} has no locks: nothing would stop a second process from "
                "writing this run. Start only one."
            )

    def close(self) -> None:
        """Release the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            _held.discard(self._key)

    def __enter__(self) -> RunDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.json: what makes the folder a run."""
        write_json(self.config, config)

    def write_env(self, env: Mapping[str, Any]) -> None:
        """Write env.json; what earlier starts of a resumed run wrote moves to its list "before"."""
        before: list[Any] = []
        try:
            earlier = json.loads(self.env.read_text())
            before = [*earlier.pop("before", []), earlier]
        except (OSError, ValueError, AttributeError, TypeError):
            pass  # the first start, or a file that somebody changed: nothing depends on it
        write_json(self.env, {**env, "before": before} if before else env)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        write_json(self.summary, summary)


def _check_empty(path: Path) -> None:
    """Raise ConfigError where a folder holds anything but a lock file, which an aborted start leaves
    behind."""
    entries = sorted(entry.name for entry in path.iterdir() if entry.name != LOCK)
    if CONFIG in entries:
        raise ConfigError(
            f"--out {path}: holds another run already. Continue that one with --resume {path}, or choose "
            "another --out."
        )
    if entries:
        shown = ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
        raise ConfigError(
            f"--out {path}: is not empty and holds no run ({shown}). Choose a new or an empty folder."
        )


def _unusable(option: str, path: Path, error: OSError) -> MasktrainError:
    """Return the error for a folder that cannot be made, read or written."""
    code = error.errno
    advice = "Choose another folder."
    if code in (errno.ENOTDIR, errno.EEXIST):
        blocker = next((p for p in (path, *path.parents) if p.exists() and not p.is_dir()), path)
        why = f"{'it' if blocker == path else blocker} is a file, not a folder"
    elif code in (errno.EACCES, errno.EPERM, errno.EROFS):
        why = f"it cannot be written ({os.strerror(code)})"
        advice = "Make it writable, or choose another folder."
    elif code in (errno.ENOSPC, errno.EDQUOT):
        why = "no space is left there"
        advice = "Free some, or choose another folder."
    elif code == errno.ENAMETOOLONG:
        why = "the name is too long"
        advice = "Choose a shorter one."
    else:
        why = f"it cannot be made or written ({error.strerror or error})"
    return ConfigError(f"{option} {path}: {why}. {advice}")


# --- files ---


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON in the way of `write_atomic`; numbers that JSON has not become null, see
    `finite`."""
    write_atomic(path, encode_json(finite(data)) + b"\n")


def finite(data: Any) -> Any:
    """Return `data` with null for each NaN and infinity, which JSON has not.

    An object that held some names them beside: {"loss": NaN} becomes {"loss": null, "nonfinite": {"loss":
    "nan"}}.
    """
    if isinstance(data, Mapping):
        out = {name: finite(value) for name, value in data.items()}
        lost = {name: str(float(value)) for name, value in data.items() if _nonfinite(value)}
        return {**out, "nonfinite": lost} if lost else out
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if _nonfinite(data) else data


def _nonfinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


# --- where a run ran ---


def environment(device: torch.device, kernels: Sequence[Choice], world_size: int = 1) -> dict[str, Any]:
    """Return what env.json holds: versions, device, commit, and which kernels serve and why not others.

    Versions come from the packages' metadata: nothing is imported to learn one.
    """
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "masktrain": masktrain.__version__,
        "commit": git_commit(Path(masktrain.__file__).resolve().parent),
        "python": platform.python_version(),
        "packages": _versions(),
        "system": platform.platform(),
        "host": socket.gethostname(),
        "device": _device(device),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ranks": world_size,
        "kernels": {
            choice.op: {"serves": choice.name, "passed_over": dict(choice.passed_over)} for choice in kernels
        },
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("MASKTRAIN_")
        },
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    # one distribution for each CUDA version
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith("nvidia-dali-cuda"):
            found[name] = distribution.version
    return found


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    driver = Path("/proc/driver/nvidia/version")
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else None,
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the model name of the CPU, or its architecture where the system does not tell."""
    try:
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass  # not a Linux system
    return platform.processor() or platform.machine()


def git_commit(package: Path) -> str | None:
    """Return the commit of the checkout that `package` is the masktrain folder of, "-dirty" behind it where
    tracked files were changed; None for an installed package, also one inside the checkout of another
    project."""
    top = _git(package, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != package.resolve().parent:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    # GIT_DIR and its like would answer for another checkout
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, env=env
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
