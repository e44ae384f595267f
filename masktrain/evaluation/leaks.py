# SPDX-License-Identifier: Apache-2.0
"""What a test must not share with its training: files, audio, and (named, not refused) speakers and recordings.

Two clips are the same audio if their mono samples are the same to 16 bits, whatever file, container or name they are in.
Only clips of equal length and rate can be, so only those are decoded. What differs by a cut, a gain or a rate is not
found. Clips without sound are all alike and no leak: they tell a probe nothing about each other.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from masktrain.data.decode import Crop
from masktrain.errors import DataError
from masktrain.evaluation.features import Progress, decoded
from masktrain.evaluation.labels import LabelledSet, Split

BATCH = 64
_SHOWN = 3
_PARTS = (("train", "test"), ("valid", "test"), ("train", "valid"))


def check_leaks(labelled: LabelledSet, progress: Progress | None = None) -> tuple[str, ...]:
    """Return what is to be known of shared speakers and recordings.

    progress: called with (clips decoded, clips to decode). Raises DataError, naming the first pairs, where a file or its
    audio is on two sides of a split (train, valid, test).
    """
    files = _file_keys(labelled)
    _refuse(labelled, files, "the same file")
    _refuse(labelled, _audio_keys(labelled, progress), "identical audio")
    return tuple(
        note
        for split in labelled.splits
        for first, second in _PARTS
        if (note := _shared_groups(labelled, split, first, second))
    )


def audio_digest(samples: NDArray[np.float32]) -> str | None:
    """Return the SHA-256 (hex) of mono samples rounded to 16 bits; None where all are 0."""
    whole = np.rint(np.clip(samples, -1, 1) * 32768).astype("<i4")
    return hashlib.sha256(whole.tobytes()).hexdigest() if whole.any() else None


def audio_digests(
    labelled: LabelledSet, rows: Sequence[int], progress: Progress | None = None
) -> list[str | None]:
    """Return `audio_digest` of whole clips, in the order of `rows`. Raises DataError for one that cannot be decoded."""
    manifest = labelled.manifest
    crops = [
        Crop(
            manifest.path(row),
            0,
            int(manifest.num_samples[row]),
            int(manifest.num_samples[row]),
            int(manifest.sample_rate[row]),
        )
        for row in rows
    ]
    return [
        audio_digest(samples)
        for _, batch in decoded(manifest, crops, BATCH, progress, rows)
        for samples in batch
    ]


def _file_keys(labelled: LabelledSet) -> list[Hashable]:
    """Return device and inode of each file, which links share."""
    keys: list[Hashable] = []
    for row in range(len(labelled.manifest)):
        try:
            status = os.stat(labelled.manifest.path(row))
        except OSError as error:
            raise DataError(f"{labelled.manifest.named(row)}: cannot be read: {error.strerror}.") from error
        keys.append((status.st_dev, status.st_ino))
    return keys


def _audio_keys(labelled: LabelledSet, progress: Progress | None) -> list[Hashable]:
    manifest = labelled.manifest
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, kind in enumerate(
        zip(manifest.num_samples.tolist(), manifest.sample_rate.tolist(), strict=True)
    ):
        alike[kind].append(row)
    rows = sorted(row for same in alike.values() if len(same) > 1 for row in same)
    keys: list[Hashable] = [("alone", row) for row in range(len(manifest))]
    for row, digest in zip(rows, audio_digests(labelled, rows, progress), strict=True):
        if digest is not None:
            keys[row] = (int(manifest.sample_rate[row]), digest)
    return keys


def _refuse(labelled: LabelledSet, keys: Sequence[Hashable], what: str) -> None:
    """Raise DataError where two rows on different sides of a split have the same key."""
    for split in labelled.splits:
        for first, second in _PARTS:
            rows = {keys[row]: row for row in _rows(split, first)}
            pairs = [(rows[keys[row]], row) for row in _rows(split, second) if keys[row] in rows]
            if pairs:
                named = "; ".join(
                    f"{labelled.manifest.named(a)} and {labelled.manifest.named(b)}"
                    for a, b in pairs[:_SHOWN]
                )
                raise DataError(
                    f"{labelled.name}, {split.name}: {what} is in {first} and in {second}, {len(pairs)} times: {named}. "
                    f"The result would count what was seen. Take one of each pair out of the manifest."
                )


def _shared_groups(labelled: LabelledSet, split: Split, first: str, second: str) -> str | None:
    if labelled.groups is None:
        return None
    groups = labelled.groups
    one, other = ({groups[row] for row in _rows(split, part)} - {""} for part in (first, second))
    shared = sorted(one & other)
    if not shared:
        return None
    named = ", ".join(shared[:_SHOWN]) + (f" and {len(shared) - _SHOWN} more" if len(shared) > _SHOWN else "")
    return f"{split.name}: {len(shared)} of {len(other)} speakers or sources in {second} are in {first} as well: {named}"


def _rows(split: Split, part: str) -> list[int]:
    rows: NDArray[np.int64] | None = getattr(split, part)
    return [] if rows is None else rows.tolist()
