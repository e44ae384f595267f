# SPDX-License-Identifier: Apache-2.0
"""The engine that decodes with libsndfile in threads of the training process.

Threads, not processes: soundfile lets go of the interpreter while libsndfile decodes, so compressed files,
where the work is, decode on all cores, and nothing outlives the process however it ends.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from masktrain.data.decode import CancelledError, Crop, Result, try_crop

S = TypeVar("S")
T = TypeVar("T")

CLOSE_SECONDS = 5.0
"""Longest wait at the end for a thread that stands in a read of a dead network folder."""
GROUP = 4
"""Clips of one task: handing a task over costs as much as decoding a spoken digit."""


class Workers:
    """Daemon threads that run tasks, urgent ones first, else in their order. With 0 threads a task runs when
    its result is asked for, in the thread that asks."""

    def __init__(self, threads: int, name: str) -> None:
        self._tasks: queue.PriorityQueue[tuple[int, int, Future[Any] | None, Callable[[], Any]]] = (
            queue.PriorityQueue()
        )
        self._serial = itertools.count()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, name=f"masktrain-{name}-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def closed(self) -> bool:
        """Say whether `close` was called: running tasks should end early."""
        return self._closed.is_set()

    def submit(self, task: Callable[[], T], *, urgent: bool = False) -> Callable[[], T]:
        """Queue a task; what is returned waits for its result, or raises what it raised (or
        CancelledError)."""
        if not self._threads:
            return task
        future: Future[T] = Future()
        self._tasks.put((0 if urgent else 1, next(self._serial), future, task))
        if self.closed():
            self._cancel()
        return future.result

    def in_groups(
        self, items: Sequence[S], task: Callable[[S], T], *, urgent: bool = False
    ) -> Callable[[], list[T]]:
        """Queue a task for each item, GROUP of them together; what is returned waits for the results in
        order."""
        groups = [
            self.submit(partial(_each, task, items[i : i + GROUP]), urgent=urgent)
            for i in range(0, len(items), GROUP)
        ]
        return lambda: [result for group in groups for result in group()]

    def _run(self) -> None:
        while True:
            _, _, future, task = self._tasks.get()
            if future is None:
                return
            try:
                future.set_result(task())
            except BaseException as error:
                future.set_exception(error)

    def _cancel(self) -> None:
        """Fail the tasks that have not begun."""
        while True:
            try:
                _, _, future, _ = self._tasks.get_nowait()
            except queue.Empty:
                break
            if future is not None:
                future.set_exception(CancelledError())
        for _ in self._threads:
            self._tasks.put((2, next(self._serial), None, _nothing))

    def close(self) -> None:
        """Fail what has not begun, ask what runs to end early, and wait for the threads (a few seconds at
        most)."""
        self._closed.set()
        self._cancel()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _each(task: Callable[[S], T], items: Sequence[S]) -> list[T]:
    return [task(item) for item in items]


def _nothing() -> None:
    """The task of the message that ends a thread."""


class SoundfileEngine:
    """See `loader.Engine`. workers: threads; 0 decodes in the thread that asks for the results."""

    def __init__(self, workers: int) -> None:
        self._workers = Workers(workers, "decode")

    def submit(self, crops: Sequence[Crop]) -> Callable[[], list[Result]]:
        """Queue the crops in groups."""
        return self._workers.in_groups(crops, lambda crop: try_crop(crop, self._workers.closed))

    def passed_on(self) -> dict[str, int]:
        """Nothing: soundfile decodes everything itself."""
        return {}

    def close(self) -> None:
        """End the threads."""
        self._workers.close()
