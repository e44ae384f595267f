# SPDX-License-Identifier: Apache-2.0
"""Checks, their rows in one flushed file, and the time that a run has.

A check answers one question with one row or several. Whatever happens in it ends up in its row: the next check runs.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
OK, WRONG, ERROR, CANNOT, NO_TIME = "ok", "wrong", "error", "cannot run", "no time"


class CannotRun(Exception):
    """The check has no meaning or no means on this machine; says why."""


@dataclass(frozen=True)
class Check:
    """name: unique. run: answers the fields of its row or rows; an AssertionError means that the answer is no."""

    name: str
    question: str
    run: Callable[[], Row | list[Row]]


class Lost(Exception):
    """The GPU answers no more in this process."""


class Results:
    """The file of rows: one JSON object a line, on the disk before the next check starts."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        """resume: keep the rows of an earlier run, except of checks that had no time; else the file is begun anew."""
        self.path = path
        kept = [row for row in read(path) if row["status"] != NO_TIME] if resume else []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self.done = {row["check"] for row in kept}
        self.counts: dict[str, int] = {}

    def write(self, row: Row) -> None:
        """Append a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.counts[row["status"]] = self.counts.get(row["status"], 0) + 1


def read(path: Path) -> list[Row]:
    """Return the rows of a file, none where there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the line that a killed run did not finish
    return rows


def run(checks: Sequence[Check], results: Results, device: torch.device, end: float) -> None:
    """Run the checks that have no row yet, in order, until the clock (time.time) passes `end`. Raises Lost."""
    for check in checks:
        if check.name in results.done:
            continue
        begin = time.time()
        common: Row = {"check": check.name, "question": check.question, "at": round(begin)}
        if begin > end:
            results.write({**common, "status": NO_TIME, "detail": "the time given with --seconds was over"})
            continue
        lost = False
        try:
            answer = check.run()
            rows = [
                {"status": OK, "detail": "", **row}
                for row in (answer if isinstance(answer, list) else [answer])
            ]
        except CannotRun as reason:
            rows = [{"status": CANNOT, "detail": str(reason)}]
        except torch.OutOfMemoryError as error:
            rows = [{"status": CANNOT, "detail": f"out of memory: {str(error)[:300]}"}]
        except AssertionError as error:
            rows = [{"status": WRONG, "detail": str(error)[:2000]}]
        except Exception as error:
            where = "".join(traceback.format_tb(error.__traceback__)[-3:])
            rows = [{"status": ERROR, "detail": f"{type(error).__name__}: {str(error)[:1500]}\n{where}"}]
            lost = not answers(device)
        seconds = round(time.time() - begin, 3)
        for row in rows:
            results.write({**common, **row, "seconds": seconds})
        print(
            f"{rows[0]['status']:<10} {seconds:8.1f} s  {check.name}  {rows[0]['detail'][:160]}", flush=True
        )
        if lost:
            raise Lost
        if device.type == "cuda":
            torch.cuda.empty_cache()


def answers(device: torch.device) -> bool:
    """Whether the GPU still works in this process: a kernel that went out of bounds ends that."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).item() == 1)
    except RuntimeError:
        return False
