# SPDX-License-Identifier: Apache-2.0
"""From (manifest, seed, step) to the batches of a rank, read ahead in the background.

An engine turns crops into samples: `soundfile_loader` or `dali_loader`. All that decides what a batch holds
(order, crops, replacements, the record of bad clips) is here, once. The record follows the batches that were
handed out, not those read ahead, so it is the same for any number of workers and any prefetch.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch

from masktrain.data.bad_clips import BadClips, replacements
from masktrain.data.config import DataConfig
from masktrain.data.crop import crop_length, crop_start
from masktrain.data.decode import Crop, Decoded, Result, too_short, try_crop
from masktrain.data.manifest import Manifest
from masktrain.data.order import batch_indices, check_shards, clip_at
from masktrain.data.soundfile_loader import CLOSE_SECONDS, SoundfileEngine
from masktrain.errors import ConfigError, DataError
from masktrain.types import AudioBatch

MOST_WORKERS = 8


class Engine(Protocol):
    """Turns crops into samples."""

    def submit(self, crops: Sequence[Crop]) -> Callable[[], list[Result]]:
        """Begin to decode and return at once; what is returned waits for the results, one for each crop."""
        ...

    def passed_on(self) -> dict[str, int]:
        """Return {reason: clips} that another engine had to decode."""
        ...

    def close(self) -> None:
        """Stop all threads; never raises."""
        ...


class Loader(Protocol):
    """The batches of one rank. bad: what was bad or noted in the batches handed out so far."""

    bad: BadClips

    @property
    def wait_seconds(self) -> float:
        """Seconds for which the consumer waited for data since this was last read."""
        ...

    def passed_on(self) -> dict[str, int]:
        """Return {reason: clips} for the clips that soundfile decoded in place of DALI."""
        ...

    def iterate(self, start_step: int) -> Iterator[list[AudioBatch]]:
        """Yield the micro-batches of this rank for `start_step` and all steps after it, without end.

        Raises DataError when too many clips are bad, or none can be used.
        """
        ...

    def close(self) -> None:
        """Stop reading ahead and free all threads; nothing can be read afterwards."""
        ...


def make_loader(
    manifest: Manifest,
    config: DataConfig,
    *,
    seed: int,
    batch_size: int,
    rank: int,
    world_size: int,
    accumulation: int,
    min_samples: Callable[[int], int],
    pin_memory: bool = False,
    column: Callable[[int], Fraction] | None = None,
) -> tuple[Loader, str]:
    """Return the loader of a rank, and in words which engine serves and why others were passed over.

    batch_size: clips of a step over all ranks and their `accumulation` micro-batches. min_samples: the
    shortest input in samples that the front end takes at a sample rate in Hz. pin_memory: put samples into
    page-locked memory, for copies to a GPU that do not hold up the host. column: the samples at a sample rate in Hz of
    which a multiple lies before every random crop; None: any number does.

    Raises:
        ConfigError: sizes that do not divide, a loader that cannot serve, crops too short for the front end.
        DataError: no clips, or too many shorter than the front end takes.
    """
    check_shards(batch_size, world_size, accumulation)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank: {rank}; allowed are 0 to {world_size - 1}.")
    if len(manifest) == 0:
        raise DataError("The manifest holds no usable clips; name data with --data.")
    least = {int(rate): min_samples(int(rate)) for rate in np.unique(manifest.sample_rate)}
    for rate, samples in least.items():
        seconds = config.clip_seconds
        if seconds is not None and round(seconds * rate) < samples:
            raise ConfigError(
                f"data.clip_seconds: {seconds:g} s are {round(seconds * rate)} samples at {rate} Hz, and the "
                f"shortest input is {samples}; allowed is {samples / rate:.3g} s or more."
            )
    bad = BadClips(manifest)
    needed = np.array([least[int(rate)] for rate in manifest.sample_rate.tolist()], dtype=np.int64)
    for clip in np.flatnonzero(manifest.num_samples < needed).tolist():
        bad.add(clip, too_short(int(manifest.num_samples[clip]), int(needed[clip])))
    if len(bad) == len(manifest):
        raise DataError(f"No clip can be used; the first: {bad.bad()[0]}.")
    workers = default_workers() if config.workers is None else config.workers
    name, reason = choose_loader(config.loader, workers)
    columns = {rate: Fraction(1) if column is None else column(rate) for rate in least}
    plan = _Plan(manifest, config, seed, batch_size, rank, world_size, accumulation, least, columns)
    engine = _engine(name, workers)
    return BatchLoader(plan, engine, bad, config.prefetch if workers else 0, pin_memory), reason


def choose_loader(wanted: str, workers: int | None = None) -> tuple[str, str]:
    """Return the engine that serves `wanted` ("auto", "dali" or "soundfile"), and why.

    Raises ConfigError if DALI is asked for by name and cannot serve.
    """
    from masktrain.data.dali_loader import unavailable

    if workers is None:
        workers = default_workers()
    threads = f"{workers} {'thread' if workers == 1 else 'threads'}" if workers else "the training thread"
    if wanted == "soundfile":
        return "soundfile", f"soundfile in {threads}: asked for"
    why_not = unavailable() if workers else "data.workers 0 leaves it no thread"
    if why_not is None:
        chosen = "asked for" if wanted == "dali" else "its pipeline works here"
        return "dali", f"DALI in {threads}: {chosen}; what it cannot decode goes to soundfile"
    if wanted == "dali":
        raise ConfigError(
            f"data.loader: 'dali' cannot serve: {why_not}. Install the extra cu13, or take 'auto'."
        )
    return "soundfile", f"soundfile in {threads}: DALI was passed over ({why_not})"


def default_workers() -> int:
    """Return the decoding threads of this rank: its share of the cores, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks_here = os.environ.get("LOCAL_WORLD_SIZE", "")
    ranks = int(ranks_here) if ranks_here.isdecimal() and int(ranks_here) > 0 else 1
    return min(MOST_WORKERS, max(1, cores // ranks))


def _engine(name: str, workers: int) -> Engine:
    if name == "dali":
        from masktrain.data.dali_loader import DaliEngine

        return DaliEngine(workers)
    return SoundfileEngine(workers)


@dataclass(frozen=True)
class _Draw:
    """One clip of a batch: the epoch and clip id it was drawn for, and its crop."""

    epoch: int
    clip_id: int
    crop: Crop


@dataclass(frozen=True)
class _Plan:
    """What stands in every batch: a pure function of the step."""

    manifest: Manifest
    config: DataConfig
    seed: int
    batch_size: int
    rank: int
    world_size: int
    accumulation: int
    least: dict[int, int]
    columns: dict[int, Fraction]

    def step(self, step: int) -> list[list[_Draw]]:
        """Return the clips of each micro-batch of this rank."""
        slices = batch_indices(step, self.batch_size, self.rank, self.world_size, self.accumulation)
        n = len(self.manifest)
        return [[self.draw(*clip_at(self.seed, index, n)) for index in part] for part in slices]

    def draw(self, epoch: int, clip_id: int) -> _Draw:
        """Return a clip with its crop of an epoch."""
        samples, rate = int(self.manifest.num_samples[clip_id]), int(self.manifest.sample_rate[clip_id])
        length = crop_length(samples, rate, self.config.clip_seconds)
        start = 0
        if self.config.crop == "random":
            start = crop_start(self.seed, epoch, clip_id, samples, length, self.columns[rate])
        return _Draw(
            epoch, clip_id, Crop(self.manifest.path(clip_id), start, length, samples, rate, self.least[rate])
        )


@dataclass
class _Ready:
    """A step's micro-batches, and what was met in making them, to be recorded when they are handed out."""

    batches: list[AudioBatch] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)
    notes: list[tuple[int, str]] = field(default_factory=list)
    exhausted: DataError | None = None


class BatchLoader:
    """The Loader over any engine. prefetch: steps read ahead; 0 makes each when it is asked for."""

    def __init__(self, plan: _Plan, engine: Engine, bad: BadClips, prefetch: int, pin_memory: bool) -> None:
        self.bad = bad
        self._plan = plan
        self._engine = engine
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._waited = 0.0
        self._readers: list[_Reader] = []
        self._closed = False
        # A thread that still runs when the interpreter goes down ends the process by C++'s terminate.
        atexit.register(self.close)

    @property
    def wait_seconds(self) -> float:
        """Seconds for which the consumer waited for data since this was last read."""
        waited, self._waited = self._waited, 0.0
        return waited

    def passed_on(self) -> dict[str, int]:
        """Return {reason: clips} that the engine gave to soundfile."""
        return self._engine.passed_on()

    def iterate(self, start_step: int) -> Iterator[list[AudioBatch]]:
        """Yield the micro-batches of each step from `start_step` on; a new call ends the one before."""
        if self._closed:
            raise RuntimeError("the loader is closed")
        for reader in self._readers:
            reader.stop()
        steps = self._steps(start_step)
        if not self._prefetch:
            return self._hand_out(lambda: next(steps), lambda: None)
        self._readers.append(_Reader(steps))
        return self._hand_out(self._readers[-1].get, self._readers[-1].stop)

    def close(self) -> None:
        """Stop reading ahead and free all threads."""
        self._closed = True
        atexit.unregister(self.close)
        for reader in self._readers:
            reader.stop()
        self._engine.close()
        for reader in self._readers:
            reader.join()

    def _hand_out(self, get: Callable[[], _Ready], stop: Callable[[], None]) -> Iterator[list[AudioBatch]]:
        try:
            while True:
                begin = time.perf_counter()
                ready = get()
                self._waited += time.perf_counter() - begin
                for clip_id, reason in ready.bad:
                    self.bad.add(clip_id, reason)
                for clip_id, text in ready.notes:
                    self.bad.add_note(clip_id, text)
                if ready.exhausted is not None:
                    raise ready.exhausted
                yield ready.batches
        finally:
            stop()

    def _steps(self, step: int) -> Iterator[_Ready]:
        """Make the steps in their order, while the engine works on `prefetch` later ones."""
        ahead: deque[tuple[list[list[_Draw]], list[Callable[[], list[Result]]]]] = deque()
        while True:
            while len(ahead) <= self._prefetch:
                draws = self._plan.step(step)
                ahead.append((draws, [self._engine.submit([d.crop for d in part]) for part in draws]))
                step += 1
            draws, pending = ahead.popleft()
            ready = _Ready()
            try:
                for part, results in zip(draws, pending, strict=True):
                    ready.batches.append(self._batch(part, results(), ready))
            except DataError as error:
                ready.exhausted = error
            yield ready

    def _batch(self, draws: list[_Draw], results: list[Result], ready: _Ready) -> AudioBatch:
        kept = [self._usable(draw, result, ready) for draw, result in zip(draws, results, strict=True)]
        parts = [decoded.samples for _, decoded in kept]
        samples = torch.empty(sum(map(len, parts)), dtype=torch.float32, pin_memory=self._pin_memory)
        np.concatenate(parts, out=samples.numpy())
        return AudioBatch(
            samples=samples,
            lengths=tuple(map(len, parts)),
            sample_rates=tuple(draw.crop.sample_rate for draw, _ in kept),
            clip_ids=torch.tensor([draw.clip_id for draw, _ in kept], dtype=torch.int64),
            starts=torch.tensor([draw.crop.start for draw, _ in kept], dtype=torch.int64),
        )

    def _usable(self, draw: _Draw, result: Result, ready: _Ready) -> tuple[_Draw, Decoded]:
        """Return the clip, or the first of its replacements that can be used."""
        others = replacements(self._plan.seed, draw.epoch, draw.clip_id, len(self._plan.manifest))
        while isinstance(result, DataError):
            ready.bad.append((draw.clip_id, str(result)))
            other = next(others, None)
            if other is None:
                raise DataError(f"No clip can be used; the last: {draw.crop.path}: {result}.")
            draw = self._plan.draw(draw.epoch, other)
            result = try_crop(draw.crop, lambda: self._closed)
        ready.notes.extend((draw.clip_id, text) for text in result.notes)
        return draw, result


class _Reader:
    """Runs an endless iterator in a thread, at most one item ahead of those taken."""

    def __init__(self, steps: Iterator[_Ready]) -> None:
        self._queue: queue.Queue[_Ready | BaseException] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(steps,), name="masktrain-reader", daemon=True)
        self._thread.start()

    def _run(self, steps: Iterator[_Ready]) -> None:
        item: _Ready | BaseException
        while not self._stop.is_set():
            try:
                item = next(steps)
            except BaseException as error:
                item = error
            while not self._stop.is_set():
                with contextlib.suppress(queue.Full):
                    self._queue.put(item, timeout=0.1)
                    break
            if isinstance(item, BaseException):
                return

    def get(self) -> _Ready:
        """Return the next item; raise what its making raised."""
        while True:
            try:
                item = self._queue.get(timeout=1.0)
            except queue.Empty:
                if self._thread.is_alive():
                    continue
                raise RuntimeError("the reading thread has ended without a word") from None
            if isinstance(item, BaseException):
                raise item
            return item

    def stop(self) -> None:
        """Ask the thread to end once the step that it works on is done."""
        self._stop.set()

    def join(self) -> None:
        """Wait for the thread's end, a few seconds at most."""
        self._thread.join(CLOSE_SECONDS)
