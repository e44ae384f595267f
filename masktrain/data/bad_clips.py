# SPDX-License-Identifier: Apache-2.0
"""The record of clips that could not be used and of what was noted about others; who replaces a bad clip.

The record decides nothing but when to stop. Every clip is tried anew each time it is drawn, so what replaces
a bad one depends on the seed, the epoch and the files only: not on what was met before, on which rank, by
which worker.
"""

from __future__ import annotations

import base64
import logging
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from masktrain.data.decode import NOTES
from masktrain.data.manifest import BadClip, Manifest, bad_clips_error, too_many
from masktrain.errors import DataError
from masktrain.kernels.philox import Purpose, host_words

log = logging.getLogger("masktrain.data")

DRAWS = 8
"""Draws of a replacement before all clips are gone through in their order."""


def replacement(seed: int, epoch: int, clip_id: int, attempt: int, n: int) -> int:
    """Return the clip that stands in for `clip_id`, whose replacements of the attempts before are bad as
    well.

    The first DRAWS attempts draw among all n clips, word `attempt` of the stream (seed, REPLACE, epoch, clip
    id); the n after them walk on from the clip itself, so that a usable clip is found if there is one.
    """
    if attempt >= DRAWS:
        return (clip_id + 1 + attempt - DRAWS) % n
    word = host_words(seed, epoch, clip_id, attempt + 1, purpose=Purpose.REPLACE)[attempt]
    return (word * n) >> 32


def replacements(seed: int, epoch: int, clip_id: int, n: int) -> Iterator[int]:
    """Yield the clips to try in place of `clip_id`, each once and never `clip_id` itself."""
    tried = {clip_id}
    for attempt in range(DRAWS + n):
        clip = replacement(seed, epoch, clip_id, attempt, n)
        if clip not in tried:
            tried.add(clip)
            yield clip


class BadClips:
    """Which clips of a manifest are bad and why, and how many were noted for what. Safe to use from any
    thread.

    Each bad clip, and the first clip of each note, is named once in the log "masktrain.data".
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._reasons: dict[int, str] = {}
        self._noted: dict[str, np.ndarray] = {}
        self._first: dict[str, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, clip_id: int, reason: str) -> None:
        """Record a bad clip. Raises DataError, naming the first ones, once there are too many."""
        with self._lock:
            if clip_id in self._reasons:
                return
            self._reasons[clip_id] = reason
            log.warning("bad clip, replaced by another: %s", self._clip(clip_id))
            self._stop_if_too_many()

    def add_note(self, clip_id: int, text: str) -> None:
        """Record that `text`, one of `decode.NOTES`, holds for a clip. A clip counts once."""
        with self._lock:
            if text not in self._noted:
                self._noted[text] = np.zeros(len(self._manifest), dtype=bool)
                self._first[text] = clip_id
                log.info("%s: %s; further ones are counted", self._manifest.named(clip_id), text)
            self._noted[text][clip_id] = True

    def bad(self) -> list[BadClip]:
        """Return the bad clips in the order in which they were met."""
        with self._lock:
            return [self._clip(clip_id) for clip_id in self._reasons]

    def notes(self) -> dict[str, tuple[int, str]]:
        """Return {note: (number of clips, path of the first)}."""
        with self._lock:
            return {
                text: (int(marks.sum()), self._manifest.path(self._first[text]))
                for text, marks in self._noted.items()
            }

    def state(self) -> dict[str, Any]:
        """Return the record as JSON-ready data, for `load_state`."""
        with self._lock:
            return {
                "bad": [[clip_id, reason] for clip_id, reason in self._reasons.items()],
                "notes": {
                    text: {"first": self._first[text], "clips": _packed(marks)}
                    for text, marks in self._noted.items()
                },
            }

    def load_state(self, state: dict[str, Any]) -> None:
        """Add what `state` returned for the same manifest. What it names is not logged again.

        Raises DataError if `state` is not such data, or if too many clips are bad.
        """
        n = len(self._manifest)
        try:
            bad = {_clip_id(clip_id, n): str(reason) for clip_id, reason in state["bad"]}
            notes = {
                text: (_clip_id(note["first"], n), _unpacked(note["clips"], n))
                for text, note in state["notes"].items()
                if text in NOTES
            }
        except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
            raise DataError(
                f"the record of bad clips is damaged, or of another manifest: {error}."
            ) from error
        with self._lock:
            self._reasons = bad | self._reasons
            for text, (first, marks) in notes.items():
                self._first[text] = first
                self._noted[text] = marks | self._noted.get(text, np.zeros(n, dtype=bool))
            self._stop_if_too_many()

    def _clip(self, clip_id: int) -> BadClip:
        return BadClip(self._manifest.path(clip_id), self._reasons[clip_id], self._manifest.where(clip_id))

    def _stop_if_too_many(self) -> None:
        if too_many(len(self._reasons), len(self._manifest)):
            raise bad_clips_error([self._clip(c) for c in self._reasons], len(self._manifest))


def _clip_id(value: Any, n: int) -> int:
    if type(value) is not int or not 0 <= value < n:
        raise ValueError(f"{value!r} is no clip of {n}")
    return value


def _packed(marks: np.ndarray) -> str:
    """Return (n,) bool as text: a corpus of two million clips may well be stereo throughout."""
    return base64.b64encode(zlib.compress(np.packbits(marks).tobytes())).decode("ascii")


def _unpacked(text: str, n: int) -> np.ndarray:
    size = (n + 7) // 8
    unzip = zlib.decompressobj()
    data = unzip.decompress(base64.b64decode(text, validate=True), size + 1)
    if len(data) != size:
        raise ValueError(f"marks of {len(data)} bytes for {n} clips")
    return np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=n).astype(bool)
