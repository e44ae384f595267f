# SPDX-License-Identifier: Apache-2.0
"""The clips of a run: which files, how long, at what sample rate, with which labels.

`readers.load_manifest` turns what the user named into `Entries`, `index.index_manifest` turns those into a
`Manifest` by reading the headers of the files whose length or rate is not yet known. The row of a clip in the
manifest is its clip id. Columns are parallel arrays, since corpora of two million clips are common.

The canonical form on disk is a TSV with the columns `path`, `num_samples`, `sample_rate_hz`, then the labels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from masktrain.errors import DataError

NUM_SAMPLES = "num_samples"
SAMPLE_RATE = "sample_rate_hz"
UNKNOWN = -1
"""Length or sample rate of a clip whose header was not read yet."""
MIN_RATE, MAX_RATE = 1000, 768_000
"""Sample rates in Hz that are taken for audio."""

_NEEDS_QUOTES = re.compile(r'[\t\r\n"]')


@dataclass(frozen=True)
class Note:
    """Something in the data that the user should see once and that stops nothing. count: clips or files."""

    text: str
    count: int


@dataclass(frozen=True)
class BadClip:
    """A clip that cannot be used. where: its manifest and line, ready to print."""

    path: str
    reason: str
    where: str

    def __str__(self) -> str:
        return f"{shown(self.path)} ({self.where}): {self.reason}"


def most_bad_clips(total: int) -> int:
    """Return how many bad clips a manifest of `total` clips may hold: max(10, 1 %)."""
    return max(10, total // 100)


def too_many(bad: int, total: int) -> bool:
    """Say whether `bad` bad clips are too many for a manifest of `total` clips: the run must stop."""
    return bad > most_bad_clips(total)


def bad_clips_error(bad: Sequence[BadClip], total: int) -> DataError:
    """Return the error that stops a run with too many bad clips."""
    first = "; ".join(str(clip) for clip in bad[:3])
    return DataError(
        f"{len(bad)} of {total} clips cannot be used; at most {most_bad_clips(total)} may be so (1 %, but at "
        f"least 10). The first: {first}. Repair these files or take them out of the manifest."
    )


def shown(path: str | os.PathLike[str]) -> str:
    """Return the path as it may be printed: quoted and escaped if it holds control or undecodable bytes."""
    text = os.fspath(path)
    return text if text.isprintable() else ascii(text)


@dataclass(frozen=True)
class Source:
    """One manifest that the user named. unit: what its rows are counted in, "" for a folder or one file."""

    name: str
    unit: str

    def where(self, row: int) -> str:
        """Return the place of a row, ready to print."""
        return f"{shown(self.name)} {self.unit} {row}" if self.unit else shown(self.name)


@dataclass(frozen=True, eq=False)
class Entries:
    """Clips in the order of the user's manifests, lengths and rates perhaps unknown. N clips.

    root: absolute folder. paths: N paths below it, no two alike. num_samples: (N,) int64, or UNKNOWN.
    sample_rate: (N,) int32 Hz, or UNKNOWN. labels: {column: N values}, "" where a manifest has none.
    sources: the manifests; source: (N,) int32 indices into them; rows: (N,) int64 line or entry there.
    """

    root: str
    paths: Sequence[str]
    num_samples: NDArray[np.int64]
    sample_rate: NDArray[np.int32]
    labels: Mapping[str, Sequence[str]]
    sources: Sequence[Source]
    source: NDArray[np.int32]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        """Return the absolute path of a clip."""
        return os.path.join(self.root, self.paths[index])

    def where(self, index: int) -> str:
        """Return the manifest and line of a clip, ready to print."""
        return self.sources[self.source[index]].where(int(self.rows[index]))

    def named(self, index: int) -> str:
        """Return the path and the place of a clip, ready to print."""
        return f"{shown(self.path(index))} ({self.where(index)})"

    def columns(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return the constructor arguments of these entries reduced to `rows`."""
        chosen = rows.tolist()
        return {
            "root": self.root,
            "paths": [self.paths[i] for i in chosen],
            "num_samples": self.num_samples[rows],
            "sample_rate": self.sample_rate[rows],
            "labels": {name: [values[i] for i in chosen] for name, values in self.labels.items()},
            "sources": self.sources,
            "source": self.source[rows],
            "rows": self.rows[rows],
        }


@dataclass(frozen=True, eq=False)
class Manifest(Entries):
    """Clips whose length (at least one sample) and sample rate are known. Row i is clip id i."""

    @cached_property
    def durations(self) -> NDArray[np.float64]:
        """(N,) seconds of each clip."""
        return self.num_samples / self.sample_rate.astype(np.float64)

    @property
    def seconds(self) -> float:
        """Seconds of all clips together."""
        return float(self.durations.sum())

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of order, paths, lengths, rates and labels.

        Paths count from the deepest folder common to all clips: moving the whole corpus, or writing the
        canonical manifest elsewhere, changes nothing; a clip added, removed, moved or of another length does.
        """
        hasher = hashlib.sha256()
        start = len(common_folder(self.paths))
        _update(hasher, (path[start:] for path in self.paths))
        hasher.update(self.num_samples.astype("<i8").tobytes())
        hasher.update(self.sample_rate.astype("<i4").tobytes())
        for name in sorted(self.labels):
            _update(hasher, [name])
            _update(hasher, self.labels[name])
        return hasher.hexdigest()


def _update(hasher: Any, texts: Iterable[str]) -> None:
    """Add texts to a hash, each ended by a NUL, which no path and no label holds."""
    hasher.update("\0".join((*texts, "")).encode("utf-8", "surrogateescape"))


def common_folder(paths: Sequence[str]) -> str:
    """Return the deepest folder that holds all paths, ending in "/" ("" if there is none).

    Whatever sorts between the first and the last path begins with what these two have in common.
    """
    if not paths:
        return ""
    folder = os.path.commonpath([os.path.dirname(min(paths)), os.path.dirname(max(paths))])
    return folder.rstrip("/") + "/" if folder else ""


def write_canonical(manifest: Manifest, path: Path) -> None:
    """Write the canonical TSV under a temporary name, then rename: `path` is never half-written.

    Clips below the folder of `path` are named relative to it, others by their absolute path. Raises DataError
    if the file cannot be written.
    """
    target = os.path.abspath(path)
    folder = os.path.dirname(target).rstrip("/") + "/"
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        try:
            with open(temporary, "w", encoding="utf-8", newline="") as file:
                file.writelines(_canonical_lines(manifest, folder))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise DataError(f"{shown(path)}: the manifest cannot be written: {error.strerror}.") from error
    except UnicodeEncodeError as error:
        raise DataError(
            f"{shown(path)}: the manifest cannot be written, since the folder of the clips "
            f"{shown(manifest.root)} is not named in UTF-8; write it into that folder."
        ) from error


def _canonical_lines(manifest: Manifest, folder: str) -> Iterable[str]:
    root = manifest.root.rstrip("/") + "/"
    inside = root.startswith(folder)
    prefix = root[len(folder) :] if inside else root
    yield "\t".join(_quoted(name) for name in ("path", NUM_SAMPLES, SAMPLE_RATE, *manifest.labels)) + "\n"
    for path, samples, rate, *labels in zip(
        manifest.paths,
        manifest.num_samples.tolist(),
        manifest.sample_rate.tolist(),
        *manifest.labels.values(),
        strict=True,
    ):
        full = prefix + path
        if not inside and full.startswith(folder):
            full = full[len(folder) :]
        yield "\t".join((_quoted(full), str(samples), str(rate), *map(_quoted, labels))) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if _NEEDS_QUOTES.search(text) else text
