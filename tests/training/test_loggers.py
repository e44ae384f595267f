# SPDX-License-Identifier: Apache-2.0
"""Rows read back: JSON that any parser takes, TensorBoard events by TensorBoard's own reader, full disks."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import resource
import signal
import struct
import zlib
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from masktrain.errors import RunError
from masktrain.training.loggers import JsonlLogger, TensorBoardLogger, cut_back, read_rows, tag


def strict(text: str) -> Any:
    """Parse JSON and refuse NaN and Infinity, which Python's parser takes by default."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_rows_are_appended_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in (1, 2, 3):
        logger.log({"step": step, "loss": 1 / step, "mfu": None})
        # readable by another process before the logger is closed
        assert [strict(line) for line in path.read_text().splitlines()][-1] == {
            "step": step,
            "loss": 1 / step,
            "mfu": None,
        }
    logger.close()
    logger.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3]


def test_numbers_that_json_has_not_become_null_and_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    logger.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "mfu": None, "ok": 1.5})
    logger.close()
    assert strict(path.read_text()) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "lr": None,
        "mfu": None,
        "ok": 1.5,
        "nonfinite": {"loss": "nan", "grad_norm": "inf", "lr": "-inf"},
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=8).filter(lambda name: name not in ("step", "nonfinite")),
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            max_size=5,
        ),
        max_size=6,
    )
)
def test_any_row_is_one_valid_line_and_comes_back(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "metrics.jsonl"
    path.unlink(missing_ok=True)
    logger = JsonlLogger(path)
    for step, row in enumerate(rows):
        logger.log({"step": step, **row})
    logger.close()
    lines = path.read_bytes().split(b"\n")[:-1]
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        found = strict(line.decode())
        for name, value in row.items():
            lost = isinstance(value, float) and not math.isfinite(value)
            assert found[name] == (None if lost else value)
            assert not lost or found["nonfinite"][name] == str(value)


def test_a_resumed_run_keeps_the_rows_up_to_its_step_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}).encode() + b"\n" for step in range(1, 8)]
    path.write_bytes(b"".join(lines) + b'{"step": 8, "lo')  # killed in the middle of a write
    logger = JsonlLogger(path, start_step=4)
    assert path.read_bytes() == b"".join(lines[:4])
    logger.log({"step": 5, "loss": 0.5})
    logger.close()
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4, 5]


def test_cut_back_drops_what_is_no_row_and_takes_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cut_back(path, 3)
    assert not path.exists() and read_rows(path) == []
    path.write_bytes(
        b'{"step": 1}\n\x00\x00\n[1]\n\xff\n{"loss": 2}\n{"step": "x"}\n{"step": 2}\n'
        + b"[" * 100_000
        + b"\n"
    )
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    cut_back(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n'


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(0, 20), max_size=20), step=st.integers(0, 20), cut=st.integers(0, 40))
def test_cut_back_at_any_byte(tmp_path: Path, steps: list[int], step: int, cut: int) -> None:
    """However much of the last row was written, the whole rows up to the step stay, and nothing else."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": n, "loss": n / 3}).encode() + b"\n" for n in steps]
    last = '{"step": 0, "text": "ä"}\n'.encode()
    path.write_bytes(b"".join(lines) + last[:cut])
    cut_back(path, step)
    kept = [line for n, line in zip(steps, lines, strict=True) if n <= step]
    assert path.read_bytes() == b"".join(kept) + (last if cut >= len(last) else b"")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def log_beyond_the_limit(kind: str, folder: Path, answer: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    logger = JsonlLogger(folder / "metrics.jsonl") if kind == "jsonl" else TensorBoardLogger(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    step = 0
    try:
        for step in range(1000):
            logger.log({"step": step, "loss": 0.1 + step})
    except RunError as error:
        answer.send((step, str(error)))
        logger.close()


@pytest.mark.parametrize("kind", ["jsonl", "tensorboard"])
def test_a_file_that_may_not_grow_ends_in_a_run_error_and_whole_records(tmp_path: Path, kind: str) -> None:
    fork = multiprocessing.get_context("fork")  # a child that starts anew would import torch again
    here, there = fork.Pipe()
    process = fork.Process(target=log_beyond_the_limit, args=(kind, tmp_path, there))
    process.start()
    assert here.poll(30)
    step, message = here.recv()
    process.join()
    assert process.exitcode == 0
    assert "could not be written" in message and "ulimit" in message
    if kind == "jsonl":
        written = (tmp_path / "metrics.jsonl").read_text()
        assert written.endswith("}\n") and len(written) <= 1000
        assert [strict(line)["step"] for line in written.splitlines()] == list(range(step))
    else:
        assert [event.step for event in scalars(tmp_path, "loss/loss")] == list(range(step))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_ends_in_a_run_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, logger._file._file.fileno())
    with pytest.raises(RunError, match="no space is left"):
        logger.log({"step": 1})
    os.close(full)


def test_a_folder_that_cannot_be_made_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for make in (lambda p: JsonlLogger(p / "metrics.jsonl"), TensorBoardLogger):
        with pytest.raises(RunError, match="could not be written"):
            make(tmp_path / "file" / "below")


# --- TensorBoard ---


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def scalars(folder: Path, name: str) -> list[Any]:
    return accumulated(folder).Scalars(name)


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    row = {"step": 7, "loss": 2.5, "loss_mse": 0.25, "lr": 1e-3, "clips_per_s": 12.0, "clip_ids": 99}
    logger.log(row | {"mfu": None, "val_loss": 3.0, "complete": True, "nonfinite": "text"})
    logger.log({"step": 8, "loss": math.nan})
    logger.close()
    logger.close()
    events = accumulated(tmp_path)
    assert sorted(events.Tags()["scalars"]) == sorted(
        ["loss/loss", "loss/mse", "optimiser/lr", "speed/clips_per_s", "validation/loss"]
    )
    assert [(e.step, e.value) for e in events.Scalars("loss/mse")] == [(7, 0.25)]
    assert math.isnan(events.Scalars("loss/loss")[1].value)


def test_rows_that_a_resumed_run_computes_again_are_hidden(tmp_path: Path) -> None:
    first = TensorBoardLogger(tmp_path)
    for step in range(1, 11):
        first.log({"step": step, "loss": float(step)})
    first.close()
    second = TensorBoardLogger(tmp_path, start_step=6)
    second.log({"step": 7, "loss": 700.0})
    second.close()
    found = [(event.step, event.value) for event in scalars(tmp_path, "loss/loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.0), (6, 6.0), (7, 700.0)]
    TensorBoardLogger(tmp_path, start_step=0).close()  # no checkpoint was there: the run starts anew
    assert scalars(tmp_path, "loss/loss") == []


def test_pictures_come_back_byte_for_byte(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 3, 2, 8, 6, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2 * 13)))
        + chunk(b"IEND", b"")
    )
    logger = TensorBoardLogger(tmp_path)
    logger.picture("reconstruction", 5, png)
    logger.close()
    (image,) = accumulated(tmp_path).Images("reconstruction")
    assert (image.step, image.width, image.height, image.encoded_image_string) == (5, 3, 2, png)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "loss/loss"),
        ("loss_info_nce", "loss/info_nce"),
        ("lr", "optimiser/lr"),
        ("grad_norm", "optimiser/grad_norm"),
        ("val_loss", "validation/loss"),
        ("baseline_mse", "baseline/mse"),
        ("step_ms", "speed/step_ms"),
    ],
)
def test_tags(name: str, expected: str) -> None:
    assert tag(name) == expected
