# SPDX-License-Identifier: Apache-2.0
"""Times of small pieces of work, and the two ceilings of this machine that they are held against.

What is compared is measured in interleaved rounds, so that a machine that slows down slows all of it down. Before each
call a buffer larger than the caches is overwritten: a training step finds its inputs in memory, not in a cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from masktrain.kernels._float32 import full_float32

# Bytes that are overwritten before each call. On a GPU this takes some tenths of a millisecond, in which the host
# launches what is measured: small kernels are timed, not their launches.
FLUSH = {"cpu": 1 << 25, "cuda": 1 << 30}
# Bytes read plus written by the copy, and rows of the square matrix product, that the ceilings are measured with.
COPY = {"cpu": 1 << 28, "cuda": 1 << 32}
MATRIX = {"cpu": 1024, "cuda": 8192}
LEAST_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """Quantiles of one call in seconds, and of how many."""

    median: float
    p20: float
    p80: float
    n: int


class Stopwatch:
    """Times calls on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH[device.type], dtype=torch.uint8, device=device)

    def once(self, work: Callable[[], object]) -> Callable[[], float]:
        """Do `work` and return what answers the seconds it took. The host does not wait on a GPU."""
        self._flush.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            seconds = time.perf_counter() - begin
            return lambda: seconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()

        def answer() -> float:
            end.synchronize()
            return start.elapsed_time(end) / 1000

        return answer

    def race(
        self, works: Mapping[str, Callable[[], object]], seconds: float, rounds: int | None = None
    ) -> dict[str, Timing]:
        """Return the timing of each of `works`, in rounds of one call each: at least LEAST_ROUNDS, and as many as fit
        into `seconds`; or as many as `rounds`. One round goes before and does not count."""
        for work in works.values():
            work()
        answers: dict[str, list[Callable[[], float]]] = {name: [] for name in works}
        end, done = time.perf_counter() + seconds, 0
        while done < (rounds or LEAST_ROUNDS) or (rounds is None and time.perf_counter() < end):
            for name, work in works.items():
                answers[name].append(self.once(work))
            done += 1
            if done % LEAST_ROUNDS == 0 and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # else the host would run seconds ahead
        return {name: timing([answer() for answer in got]) for name, got in answers.items()}


def timing(seconds: list[float]) -> Timing:
    """Return the quantiles of the seconds of single calls."""
    ordered = sorted(seconds)
    p20, median, p80 = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.5, 0.8))
    return Timing(median, p20, p80, len(ordered))


class Ceilings:
    """What this machine reaches with the least work: bytes of a copy, operations of a matrix product."""

    def __init__(self, watch: Stopwatch, seconds: float = 0.3) -> None:
        """seconds: for each measurement."""
        self._watch, self._seconds = watch, seconds
        self._matrix: dict[torch.dtype, float] = {}
        kind, device = watch.device.type, watch.device
        source = torch.randint(0, 255, (COPY[kind] // 2,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        took = watch.race({"copy": lambda: target.copy_(source)}, seconds)["copy"].median
        self.copy = COPY[kind] / took
        """Bytes per second, read and written ones together."""

    def matrix(self, dtype: torch.dtype) -> float:
        """Return the operations per second of a large product of random matrices; float32 without TF32."""
        if dtype not in self._matrix:
            n, device = MATRIX[self._watch.device.type], self._watch.device
            n //= 2 if dtype == torch.float32 else 1
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            with full_float32(device.type):
                took = self._watch.race({"product": lambda: torch.mm(a, b)}, self._seconds)["product"].median
            self._matrix[dtype] = 2 * n**3 / took
        return self._matrix[dtype]


def share(took: float, *, moved: int, done: int, ceilings: Ceilings, dtype: torch.dtype) -> float:
    """Return the least time that the ceilings allow over the time it took: 1 is the roofline.

    took: seconds. moved: bytes that have to be read and written. done: operations of matrix products in `dtype`.
    """
    least = moved / ceilings.copy
    if done:
        least = max(least, done / ceilings.matrix(dtype))
    return least / took


def along(outputs: tuple[Tensor, ...], seed: int = 0) -> list[Tensor]:
    """Return a random direction for each output, to take gradients along."""
    device = outputs[0].device
    generator = torch.Generator(device).manual_seed(seed)
    return [
        torch.randn(o.shape, generator=generator, dtype=torch.float32, device=device).to(o.dtype)
        for o in outputs
    ]
