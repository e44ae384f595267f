# SPDX-License-Identifier: Apache-2.0
"""The engine that decodes whole batches with NVIDIA DALI's CPU operators.

DALI is handed the bytes of the files in our order and returns the crops; checks and downmix are those of
`decode`, so a batch is the same as soundfile's: bit for bit in WAV and FLAC, within 1e-6 in Vorbis. DALI
decodes whole files before it cuts them, so soundfile serves where seeking to the crop is cheaper, and for
what DALI cannot decode. A file on which DALI fails takes its batch with it: soundfile decodes those clips one
by one, and says which one is bad.
"""

from __future__ import annotations

import importlib.util
import io
import os
import struct
import threading
import wave
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from masktrain.data.decode import (
    Container,
    Crop,
    Result,
    check_length,
    finish,
    inspect,
    misnamed,
    opened,
    try_crop,
)
from masktrain.data.soundfile_loader import Workers
from masktrain.errors import DataError

MOST_CLIPS = 64
MOST_DECODED_BYTES = 1 << 28
"""Clips, and float32 bytes of their whole files, of one DALI batch: its buffers grow to the largest and
stay."""
MOST_FILE_BYTES = 1 << 26
"""Float32 bytes of the largest file that DALI decodes."""
SEEK_PAYS = 1.5
"""WAV and FLAC files longer than this many crops are read faster by seeking: 2 s crops of 4 s files at 44.1
kHz, on two cores, 2.4 times as fast in WAV and 1.3 times in FLAC. DALI's lead is in WAV files taken whole."""
_DEPTH = 2


@cache
def unavailable() -> str | None:
    """Return why DALI cannot serve here, or None. Runs a tiny pipeline once."""
    try:
        if importlib.util.find_spec("nvidia.dali") is None:
            return "it is not installed"
    except Exception as error:  # the parent package is absent, or fails to import
        return f"it is not installed ({type(error).__name__}: {error})"
    try:
        pipeline = _Pipeline(1)
    except Exception as error:
        return f"its probe failed: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    pipeline.close()
    return None


@dataclass(frozen=True)
class _Encoded:
    """A file for DALI. content: (bytes,) uint8. decoded: float32 bytes of the whole file."""

    crop: Crop
    content: NDArray[np.uint8]
    container: Container
    decoded: int


class DaliEngine:
    """See `loader.Engine`. workers: threads that read and check, and as many of DALI's that decode."""

    def __init__(self, workers: int) -> None:
        self._threads = workers
        self._workers = Workers(workers, "read")
        self._runner = Workers(1, "dali")
        self._pipeline: _Pipeline | None = None
        self._passed_on: Counter[str] = Counter()
        self._lock = threading.Lock()

    def submit(self, crops: Sequence[Crop]) -> Callable[[], list[Result]]:
        """Queue the reading of the files, and a DALI run for when they are there."""
        loads = self._workers.in_groups(crops, self._load)
        return self._runner.submit(lambda: self._decode(loads()))

    def passed_on(self) -> dict[str, int]:
        """Return {reason: clips} that soundfile decoded."""
        with self._lock:
            return dict(self._passed_on)

    def close(self) -> None:
        """End the threads and free the pipeline."""
        self._workers.close()
        self._runner.close()
        self._pipeline = None

    def _load(self, crop: Crop) -> _Encoded | Result:
        """Read a file for DALI, or decode it by soundfile, or say why it is bad."""
        try:
            with opened(crop.path) as fd:
                container = inspect(fd)
                decoded = 4 * container.channels * crop.num_samples
                why_not = _why_not(crop, container, decoded)
                if why_not is None and crop.num_samples >= crop.min_samples:
                    content = np.empty(os.fstat(fd).st_size, dtype=np.uint8)
                    with io.FileIO(fd, closefd=False) as file:
                        got = file.readinto(content.data)
                    if got != len(content):
                        return DataError("became shorter while it was read")
                    return _Encoded(crop, content, container, decoded)
        except DataError as error:
            return error
        return self._by_soundfile(crop, why_not)

    def _by_soundfile(self, crop: Crop, reason: str | None) -> Result:
        if reason is not None:
            with self._lock:
                self._passed_on[reason] += 1
        return try_crop(crop, self._workers.closed)

    def _decode(self, loaded: list[_Encoded | Result]) -> list[Result]:
        """Run DALI over what was read for it, two batches at a time in its queue."""
        places = [i for i, item in enumerate(loaded) if isinstance(item, _Encoded)]
        files = [item for item in loaded if isinstance(item, _Encoded)]
        waiting: deque[list[_Encoded]] = deque()
        results: list[Result] = []
        for batch in _batches(files):
            self._feed(batch)
            waiting.append(batch)
            if len(waiting) == _DEPTH:
                results += self._collect(waiting)
        while waiting:
            results += self._collect(waiting)
        decoded: dict[int, Result] = dict(zip(places, results, strict=True))
        return [decoded[i] if isinstance(item, _Encoded) else item for i, item in enumerate(loaded)]

    def _feed(self, batch: list[_Encoded]) -> None:
        if self._pipeline is None:
            self._pipeline = _Pipeline(self._threads)
        self._pipeline.feed([e.content for e in batch], [(e.crop.start, e.crop.length) for e in batch])

    def _collect(self, waiting: deque[list[_Encoded]]) -> list[Result]:
        """Return the results of the oldest batch; of all of them where DALI fails, which loses its
        pipeline."""
        assert self._pipeline is not None
        try:
            audio, shapes, rates = self._pipeline.outputs()
        except RuntimeError:
            lost = [encoded.crop for batch in waiting for encoded in batch]
            waiting.clear()
            self._pipeline.close()
            self._pipeline = None
            return self._workers.in_groups(
                lost, lambda crop: self._by_soundfile(crop, "in a batch on which DALI failed"), urgent=True
            )()
        batch = waiting.popleft()
        items = list(zip(batch, audio, shapes, rates, strict=True))
        results = self._workers.in_groups(items, lambda item: self._finish(*item), urgent=True)()
        self._pipeline.release()
        return results

    def _finish(self, encoded: _Encoded, raw: NDArray[np.float32], samples: int, rate: float) -> Result:
        crop = encoded.crop
        try:
            check_length(crop, samples, int(rate))
            return finish(crop, np.array(raw), misnamed(crop.path, _FORMATS[encoded.container.kind]))
        except DataError:
            return self._by_soundfile(crop, "refused after DALI had decoded it")


_FORMATS = {"WAV": "WAV", "FLAC": "FLAC", "VORBIS": "OGG"}


def _why_not(crop: Crop, container: Container, decoded: int) -> str | None:
    """Return why soundfile should decode a file, or None."""
    if container.kind == "OTHER":
        return "not WAV, FLAC or Vorbis"
    if container.channels == 0:
        return "a header without channels"
    if decoded > MOST_FILE_BYTES:
        return f"over {MOST_FILE_BYTES >> 20} MB when decoded"
    if container.kind in ("WAV", "FLAC") and crop.num_samples > SEEK_PAYS * crop.length:
        return f"WAV or FLAC of over {SEEK_PAYS} times the crop, where seeking is faster"
    return None


def _batches(files: list[_Encoded]) -> Iterator[list[_Encoded]]:
    """Cut into batches of bounded size, in order."""
    batch: list[_Encoded] = []
    total = 0
    for file in files:
        if batch and (len(batch) == MOST_CLIPS or total + file.decoded > MOST_DECODED_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(file)
        total += file.decoded
    if batch:
        yield batch


class _Pipeline:
    """DALI's pipeline: bytes in, crops out, up to two batches on the way."""

    def __init__(self, threads: int) -> None:
        from nvidia.dali import Pipeline, fn, types

        self._pipe = Pipeline(
            batch_size=MOST_CLIPS, num_threads=threads, device_id=None, prefetch_queue_depth=_DEPTH
        )
        with self._pipe:
            content = fn.external_source(name="content", dtype=types.DALIDataType.UINT8, ndim=1)
            start = fn.external_source(name="start", dtype=types.DALIDataType.INT64, ndim=1)
            length = fn.external_source(name="length", dtype=types.DALIDataType.INT64, ndim=1)
            audio, rate = fn.decoders.audio(content, dtype=types.DALIDataType.FLOAT, downmix=False)
            crop = fn.slice(audio, start, length, axes=[0], out_of_bounds_policy="trim_to_shape")
            self._pipe.set_outputs(crop, audio.shape(), rate)
        self._pipe.build()
        self._warm_up()

    def _warm_up(self) -> None:
        """Fill the queue, as DALI's first run asks, with a known file; raise RuntimeError if it comes back
        wrong."""
        content = np.frombuffer(_tiny_wav(), dtype=np.uint8)
        for _ in range(_DEPTH):
            self._feed([content], [(1, 2)])
        self._pipe.schedule_run()
        for _ in range(_DEPTH):
            audio, samples, rates = self.outputs()
            if audio[0].ravel().tolist() != [2 / 32768, 3 / 32768] or (samples, rates) != ([4], [8000.0]):
                raise RuntimeError("a known WAV was decoded wrongly")
            self.release()

    def feed(self, contents: list[NDArray[np.uint8]], crops: list[tuple[int, int]]) -> None:
        """Hand over a batch: the bytes of each file, and (start, length) of its crop."""
        self._feed(contents, crops)
        self._pipe.schedule_run()

    def _feed(self, contents: list[NDArray[np.uint8]], crops: list[tuple[int, int]]) -> None:
        places = np.array(crops, dtype=np.int64)
        self._pipe.feed_input("content", contents)
        self._pipe.feed_input("start", np.ascontiguousarray(places[:, :1]))
        self._pipe.feed_input("length", np.ascontiguousarray(places[:, 1:]))

    def outputs(self) -> tuple[list[NDArray[np.float32]], list[int], list[float]]:
        """Wait for the oldest batch. Return views of its crops, (n, channels), valid until `release`, the
        samples of the whole files, and their rates in Hz. Raises RuntimeError if a file could not be
        decoded."""
        audio, shapes, rates = self._pipe.share_outputs()
        return (
            [np.asarray(audio.at(i)) for i in range(len(audio))],
            np.asarray(shapes.as_tensor())[:, 0].tolist(),
            np.asarray(rates.as_tensor()).ravel().tolist(),
        )

    def release(self) -> None:
        """Give the buffers of the oldest batch back."""
        self._pipe.release_outputs()

    def close(self) -> None:
        """Free threads and buffers."""
        del self._pipe


def _tiny_wav() -> bytes:
    """Return a mono WAV file of the 16-bit samples 1, 2, 3, 4 at 8 kHz."""
    with io.BytesIO() as content:
        with wave.open(content, "wb") as file:
            file.setparams((1, 2, 8000, 4, "NONE", ""))
            file.writeframes(struct.pack("<4h", 1, 2, 3, 4))
        return content.getvalue()
