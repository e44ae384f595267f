# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a run go: metrics.jsonl and TensorBoard.

Both write whole records only: a record that the disk does not take leaves the file as it was. Both take the
number of steps that a resumed run goes on from; the rows beyond it, which the run will compute again,
disappear.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from masktrain.training.run_dir import finite
from masktrain.training.storage import write_atomic, write_failed


class Logger(Protocol):
    """Takes rows. A row maps names to numbers, strings, booleans and None, with the number of steps done
    under "step"."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one row. Raises RunError where it cannot be written."""

    def close(self) -> None:
        """Put what was written on the disk and release the file. A second call does nothing."""


class _AppendFile:
    """A file that grows by whole records: `write` raises RunError and takes back what it wrote of one that
    fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise write_failed(path.name, path.parent, error) from error

    def write(self, record: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            left = memoryview(record)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            with suppress(OSError):  # a device that fails may refuse this too
                self._file.truncate(end)
            raise write_failed(self.path.name, self.path.parent, error) from error

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise write_failed(self.path.name, self.path.parent, error) from error
        finally:
            self._file.close()


# --- metrics.jsonl ---


class JsonlLogger:
    """Appends one line of JSON a row. A NaN or an infinity becomes null, named under "nonfinite"."""

    def __init__(self, path: Path, start_step: int = 0) -> None:
        """start_step: steps that the run has behind it; rows beyond it and a torn last line are cut off."""
        cut_back(path, start_step)
        self._file = _AppendFile(path)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is in the file when this returns."""
        self._file.write(json.dumps(finite(row), allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Put the file on the disk and release it."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without lines that are no rows (one torn by a kill); none without a
    file."""
    return [row for _, row in _lines(path)]


def cut_back(path: Path, step: int) -> None:
    """Keep the rows of a metrics.jsonl up to `step`, byte for byte."""
    if path.exists():
        kept = b"".join(line for line, row in _lines(path) if row["step"] <= step)
        write_atomic(path, kept)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise write_failed(path.name, path.parent, error) from error
    found = []
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append((line, row))
    return found


# --- TensorBoard ---

# name of a row -> tag; TensorBoard groups by what stands before the slash
_GROUPS = {"lr": "optimiser", "grad_norm": "optimiser", "loss": "loss"}
_HIDDEN = ("step", "clip_ids")


def tag(name: str) -> str:
    """Return the TensorBoard tag of a name of a row: loss_mse -> loss/mse, val_loss -> validation/loss, probe_knn_accuracy
    -> probe/knn_accuracy."""
    if name in _GROUPS:
        return f"{_GROUPS[name]}/{name}"
    for prefix, group in (
        ("loss_", "loss"),
        ("val_", "validation"),
        ("baseline_", "baseline"),
        ("probe_", "probe"),
    ):
        if name.startswith(prefix):
            return f"{group}/{name.removeprefix(prefix)}"
    return f"speed/{name}"


class TensorBoardLogger:
    """Writes an event file that TensorBoard reads. Numbers become scalars; what is no number is left out."""

    def __init__(self, folder: Path, start_step: int = 0) -> None:
        """start_step: steps that the run has behind it; what earlier event files say beyond it is hidden."""
        # written record by record here, not by tensorboard's writer thread, which reports a full disk late or
        # never
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._events = event_pb2
        self._summaries = summary_pb2
        resumed = folder.is_dir() and any(folder.glob("*tfevents*"))
        # files are read in the order of their names
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{socket.gethostname()}.{os.getpid()}"
        self._file = _AppendFile(folder / name)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if resumed:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=start_step + 1, session_log=start)  # hides all that is at this step or later

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of one row."""
        values = [
            self._summaries.Summary.Value(tag=tag(name), simple_value=float(value))
            for name, value in row.items()
            if name not in _HIDDEN and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        self._write(step=row["step"], summary=self._summaries.Summary(value=values))

    def picture(self, name: str, step: int, png: bytes) -> None:
        """Write one PNG picture."""
        width, height = struct.unpack(">II", png[16:24])  # the IHDR chunk
        image = self._summaries.Summary.Image(
            width=width, height=height, colorspace=4, encoded_image_string=png
        )
        value = self._summaries.Summary.Value(tag=name, image=image)
        self._write(step=step, summary=self._summaries.Summary(value=[value]))

    def _write(self, **fields: Any) -> None:
        self._records.write(self._events.Event(wall_time=time.time(), **fields).SerializeToString())

    def close(self) -> None:
        """Put the file on the disk and release it."""
        self._file.close()
