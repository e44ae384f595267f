# SPDX-License-Identifier: Apache-2.0
"""Finds the length and sample rate of each clip, and the clips that cannot be used.

Only headers are read, and only of files whose manifest does not say both: a canonical manifest is taken at
its word, but a sample of its files is looked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from masktrain.data.decode import probe
from masktrain.data.manifest import (
    MAX_RATE,
    MIN_RATE,
    UNKNOWN,
    BadClip,
    Entries,
    Manifest,
    Note,
    bad_clips_error,
    too_many,
)
from masktrain.errors import DataError

ABSENT = "no such file"
"""What `decode.probe` says of a file that is absent."""
_SAMPLED = 1024
_CHUNK = 64


def index_manifest(
    entries: Entries,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 2,
    notes: list[Note] | None = None,
) -> tuple[Manifest, list[BadClip]]:
    """Return the usable clips with their lengths and rates, and the clips left out, in manifest order.

    progress: called as progress(done, total) with the number of headers read so far. workers: threads. notes:
    receives what the user should know besides. Raises DataError if more than max(10, 1 %) of the clips cannot
    be used (`manifest.too_many`), or none can.
    """
    num_samples = entries.num_samples.copy()
    sample_rate = entries.sample_rate.copy()
    unread = np.flatnonzero((num_samples == UNKNOWN) | (sample_rate == UNKNOWN)).tolist()
    known = np.flatnonzero((num_samples != UNKNOWN) & (sample_rate != UNKNOWN))
    reasons: dict[int, str] = dict.fromkeys(_absent_of_sample(entries, known), ABSENT)
    reasons |= dict.fromkeys(known[num_samples[known] == 0].tolist(), "has no samples")
    differing: list[str] = []
    chunks = [unread[i : i + _CHUNK] for i in range(0, len(unread), _CHUNK)]
    done = 0
    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            for chunk, found in zip(
                chunks, pool.map(lambda rows: _headers(entries, rows), chunks), strict=True
            ):
                for row, header in zip(chunk, found, strict=True):
                    if isinstance(header, str):
                        reasons[row] = header
                        continue
                    claimed = int(num_samples[row])
                    num_samples[row], sample_rate[row] = header
                    if claimed != UNKNOWN and 100 * abs(claimed - header[0]) > header[0]:
                        differing.append(f"{entries.named(row)}: {claimed}, header {header[0]}")
                done += len(chunk)
                if progress is not None:
                    progress(done, len(unread))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if differing and notes is not None:
        notes.append(
            Note(
                f"{len(differing)} clips differ in samples by over 1 % from what their manifest says; the "
                f"headers of the files are believed. The first: {'; '.join(differing[:3])}.",
                len(differing),
            )
        )
    bad = [BadClip(entries.path(row), reasons[row], entries.where(row)) for row in sorted(reasons)]
    if len(bad) == len(entries) and set(reasons.values()) == {ABSENT}:
        raise _none_exists(entries, 0, "")
    if too_many(len(bad), len(entries)) or len(bad) == len(entries):
        raise bad_clips_error(bad, len(entries))
    usable = np.ones(len(entries), dtype=bool)
    usable[list(reasons)] = False
    rows = np.flatnonzero(usable)
    columns = entries.columns(rows) | {"num_samples": num_samples[rows], "sample_rate": sample_rate[rows]}
    return Manifest(**columns), bad


def _headers(entries: Entries, rows: list[int]) -> list[tuple[int, int] | str]:
    return [_header(entries.path(row)) for row in rows]


def _header(path: str) -> tuple[int, int] | str:
    """Return (samples, rate in Hz) of a file, or why it cannot be used."""
    try:
        info = probe(path)
    except DataError as error:
        array = path.lower().endswith(".npy") and str(error) != ABSENT
        return "a NumPy array, not audio: name the audio that it was made from" if array else str(error)
    if not MIN_RATE <= info.sample_rate <= MAX_RATE:
        return f"sample rate {info.sample_rate} Hz; allowed are {MIN_RATE} to {MAX_RATE} Hz"
    return info.num_samples, info.sample_rate


def _absent_of_sample(entries: Entries, known: np.ndarray) -> list[int]:
    """Return the absent clips among some that are not opened here; refuse all if none of them exists."""
    places = np.linspace(0, len(known) - 1, min(len(known), _SAMPLED)).astype(np.int64)
    sample = known[places].tolist()
    absent = [row for row in sample if not os.path.exists(entries.path(row))]
    if sample and len(absent) == len(sample):
        raise _none_exists(entries, absent[0], f" ({len(sample)} were looked for)")
    return absent


def _none_exists(entries: Entries, row: int, looked: str) -> DataError:
    """Return the error for clips none of which exists; `row` is the one to name."""
    hint = "Relative paths count from the folder of the manifest, in fairseq TSV from its first line."
    if "/~" in entries.path(row):
        hint = "'~' is not expanded in manifests: write the folder in full."
    return DataError(f"None of the clips exists{looked}; the first is {entries.named(row)}. {hint}")
