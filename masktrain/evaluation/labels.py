# SPDX-License-Identifier: Apache-2.0
"""Clips with their labels and their official folds or splits.

A manifest brings a label column and a column of folds or of splits; the folder of a known task (masktrain/evaluation/
tasks.py) brings both in its own form. Nothing is ever split at random here: which clips test is the data's to say. In
cross validation each fold tests once and all others train; such data have no validation clips.

A clip that cannot be used stops the evaluation, since a number over fewer clips is another number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from masktrain.data.index import index_manifest
from masktrain.data.manifest import UNKNOWN, Entries, Manifest, Note, Source, shown
from masktrain.data.readers import REPEATED, load_manifest
from masktrain.errors import ConfigError, DataError, nearest
from masktrain.evaluation.tasks import Metric, Task, find_task, read_folder

Labels = NDArray[np.int64] | NDArray[np.uint8]

LABEL_COLUMNS = ("label", "labels", "category", "class", "target")
"""Names of the label column where none is given, the first that the manifest has; else the only column left."""
FOLD, SPLIT = "fold", "split"
GROUP_COLUMNS = (
    "speaker",
    "speaker_id",
    "client_id",
    "source",
    "source_id",
    "src_file",
    "fsid",
    "group",
    "session",
)
"""Columns that tell which speaker or recording a clip is of, in any case; the first that the manifest has."""
_PLACES = {
    **dict.fromkeys(("train", "training", "dev"), "train"),
    **dict.fromkeys(("valid", "validation", "val"), "valid"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHOWN = 5


@dataclass(frozen=True, eq=False)
class Split:
    """Who trains and who tests: rows of the manifest, ascending, disjoint. valid: None where the data has none."""

    name: str
    train: NDArray[np.int64]
    valid: NDArray[np.int64] | None
    test: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """Labelled clips. C clips, K classes.

    labels: (C,) int64 class of each clip, or (C, K) uint8, 1 where a clip has the label. classes: their names, sorted.
    unit_seconds: length that every clip is cut or filled to; None: whole clips. groups: speaker or recording of each
    clip, None where the data does not tell. notes: what the user should know.
    """

    name: str
    manifest: Manifest
    labels: Labels
    classes: tuple[str, ...]
    splits: tuple[Split, ...]
    unit_seconds: float | None
    metric: Metric
    groups: tuple[str, ...] | None
    notes: tuple[str, ...]

    @property
    def multilabel(self) -> bool:
        """Whether a clip may have several labels."""
        return self.labels.ndim == 2


@dataclass
class _Read:
    """What a manifest or a folder says of its clips, before it is checked."""

    name: str
    entries: Entries
    labels: list[tuple[str, ...]]
    places: list[str]
    rule: str
    groups: list[str] | None
    multilabel: bool
    notes: list[str]


def read_labelled(
    data: Path,
    *,
    label: str | None = None,
    fold: str | None = None,
    split: str | None = None,
    task: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LabelledSet:
    """Return the labelled clips of a manifest, or of the folder of a known task.

    label, fold, split: columns of the manifest; None: see LABEL_COLUMNS, and "fold" or "split". task: its name. progress:
    called with (done, total) headers read. Labels with ";" between them, or with "," in a column called "labels", or of
    a task that is measured by mAP, are several labels of a clip. Rows whose fold or split is empty belong to no split and
    are left out, with a note (EVAR's GTZAN has such).

    Raises ConfigError for a column or task that is not there, DataError for data that cannot be evaluated.
    """
    preset = find_task(task) if task is not None else None
    if preset is not None and data.is_dir():
        read = _from_task(preset, data)
    else:
        read = _from_manifest(data, label, fold, split, preset)
    return _checked(read, preset, progress)


# --- what is written ---


def _from_task(task: Task, root: Path) -> _Read:
    table = read_folder(task, root)
    clips = len(table.paths)
    unknown = np.full(clips, UNKNOWN)
    entries = Entries(
        root=os.path.abspath(root),
        paths=table.paths,
        num_samples=unknown.astype(np.int64),
        sample_rate=unknown.astype(np.int32),
        labels={"label": [";".join(labels) for labels in table.labels], task.rule: table.places},
        sources=[Source(str(root), "")],
        source=np.zeros(clips, dtype=np.int32),
        rows=np.zeros(clips, dtype=np.int64),
    )
    groups = table.groups if any(table.groups) else None
    return _Read(
        task.title, entries, table.labels, table.places, task.rule, groups, task.metric == "mAP", table.notes
    )


def _from_manifest(
    data: Path, label: str | None, fold: str | None, split: str | None, task: Task | None
) -> _Read:
    entries, notes = load_manifest([data])
    repeated = next((note.text for note in notes if REPEATED in note.text), None)
    if repeated is not None:
        raise DataError(
            f"{shown(data)}: {repeated} A clip that trains and tests, or counts twice, makes the result worthless: "
            "name each file once."
        )
    columns = {name: list(values) for name, values in entries.labels.items()}
    if not columns:
        raise DataError(
            f"{shown(data)}: holds no labels. Give a CSV with the columns path, label and fold or split."
        )
    rule, column = _place_column(data, columns, fold, split, task)
    group = next((name for known in GROUP_COLUMNS for name in columns if name.lower() == known), None)
    name = _label_column(data, columns, label, {column, *([group] if group else [])})
    values = columns[name]
    several = (
        any(";" in v for v in values)
        or (name == "labels" and any("," in v for v in values))
        or (task is not None and task.metric == "mAP")
    )
    comma = several and (name == "labels" or (task is not None and task.metric == "mAP"))
    labels = [_several(v, comma) if several else ((v.strip(),) if v.strip() else ()) for v in values]
    groups = columns[group] if group and group != name else None
    title = task.title if task else data.stem
    return _Read(
        title, entries, labels, columns[column], rule, groups, several, [note.text for note in notes]
    )


def _several(text: str, comma: bool) -> tuple[str, ...]:
    parts = (text.replace(",", ";") if comma else text).split(";")
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _place_column(
    data: Path, columns: dict[str, list[str]], fold: str | None, split: str | None, task: Task | None
) -> tuple[str, str]:
    """Return the rule, "fold" or "split", and its column."""
    if fold is not None and split is not None:
        raise ConfigError("--fold and --split: give one of the two columns.")
    for rule, given in ((FOLD, fold), (SPLIT, split)):
        if given is not None:
            _check_column(data, columns, given, f"--{rule}")
            return rule, given
    wanted = (task.rule,) if task is not None else (FOLD, SPLIT)
    there = [name for name in wanted if name in columns]
    if len(there) == 2:
        raise ConfigError(
            f"{shown(data)}: has a column fold and a column split. Say which one counts: --fold fold, or --split split."
        )
    if not there:
        raise DataError(
            f"{shown(data)}: has no column {' or '.join(wanted)} (it has {', '.join(columns)}), so nothing says which clips "
            "test. Add the official folds or splits (train, valid, test), or name the column with --fold or --split; "
            "nothing is split at random here."
        )
    return there[0], there[0]


def _label_column(data: Path, columns: dict[str, list[str]], given: str | None, taken: set[str]) -> str:
    if given is not None:
        _check_column(data, columns, given, "--label")
        return given
    named = [name for name in LABEL_COLUMNS if name in columns]
    left = [name for name in columns if name not in taken]
    if named:
        return named[0]
    if len(left) == 1:
        return left[0]
    raise ConfigError(
        f"{shown(data)}: which column holds the labels? It has {', '.join(columns)}. Name it with --label."
    )


def _check_column(data: Path, columns: dict[str, list[str]], name: str, flag: str) -> None:
    if name not in columns:
        raise ConfigError(
            f"{flag} {name}: {shown(data)} has no such column.{nearest(name, columns)} It has {', '.join(columns)}."
        )


# --- what is meant ---


def _checked(read: _Read, task: Task | None, progress: Callable[[int, int], None] | None) -> LabelledSet:
    named = np.array([bool(place.strip()) for place in read.places], dtype=bool)
    kept = np.flatnonzero(named)
    if len(kept) < len(read.places):
        left = len(read.places) - len(kept)
        read.notes.append(f"{left} clips have no {read.rule} and are left out")
        if not len(kept):
            raise DataError(f"{read.name}: the column {read.rule} is empty.")
    rows = kept.tolist()
    manifest = _indexed(Entries(**read.entries.columns(kept)), progress, read.notes)
    labels, classes = _labels(read.name, manifest, [read.labels[i] for i in rows], read.multilabel)
    places = [read.places[i].strip() for i in rows]
    splits = (
        _by_fold(read.name, places, task) if read.rule == FOLD else _by_split(read.name, manifest, places)
    )
    notes = [*read.notes, *_absent_classes(labels, classes, splits)]
    return LabelledSet(
        name=read.name,
        manifest=manifest,
        labels=labels,
        classes=classes,
        splits=splits,
        unit_seconds=task.unit_seconds if task else None,
        metric="mAP" if labels.ndim == 2 else "accuracy",
        groups=tuple(read.groups[i] for i in rows) if read.groups is not None else None,
        notes=tuple(notes),
    )


def _indexed(entries: Entries, progress: Callable[[int, int], None] | None, notes: list[str]) -> Manifest:
    said: list[Note] = []
    manifest, bad = index_manifest(entries, progress=progress, notes=said)
    if bad:
        first = "; ".join(map(str, bad[:_SHOWN]))
        raise DataError(
            f"{len(bad)} of {len(entries)} labelled clips cannot be used: {first}. Repair them, or take them out of the "
            "manifest: a number over fewer clips is another number."
        )
    notes += [note.text for note in said]
    return manifest


def _labels(
    name: str, manifest: Manifest, labels: Sequence[tuple[str, ...]], multilabel: bool
) -> tuple[Labels, tuple[str, ...]]:
    missing = [i for i, own in enumerate(labels) if not own]
    if missing:
        first = "; ".join(manifest.named(i) for i in missing[:_SHOWN])
        raise DataError(f"{name}: {len(missing)} of {len(labels)} clips have no label. The first: {first}.")
    classes = tuple(sorted({label for own in labels for label in own}, key=_natural))
    if len(classes) < 2:
        raise DataError(
            f"{name}: every clip has the label {classes[0]!r}; at least two classes are needed. Is --label the right "
            "column?"
        )
    number = {label: k for k, label in enumerate(classes)}
    if not multilabel:
        return np.array([number[own[0]] for own in labels], dtype=np.int64), classes
    marks = np.zeros((len(labels), len(classes)), dtype=np.uint8)
    for row, own in enumerate(labels):
        marks[row, [number[label] for label in own]] = 1
    return marks, classes


def _natural(text: str) -> tuple[int, int, str]:
    """Sort whole numbers by value and before all else."""
    whole = text.isascii() and text.isdigit() and len(text) < 18
    return (0, int(text), text) if whole else (1, 0, text)


def _by_fold(name: str, places: list[str], task: Task | None) -> tuple[Split, ...]:
    folds = sorted(set(places), key=_natural)
    if len(folds) < 2:
        raise DataError(f"{name}: all clips are of fold {folds[0]!r}; at least two folds are needed.")
    if task is not None and task.folds is not None and len(folds) != task.folds:
        raise DataError(
            f"{name}: has {len(folds)} folds ({', '.join(folds[:12])}); the official ones are {task.folds}."
        )
    own = np.array(places)
    return tuple(
        Split(f"fold {fold}", np.flatnonzero(own != fold), None, np.flatnonzero(own == fold))
        for fold in folds
    )


def _by_split(name: str, manifest: Manifest, places: list[str]) -> tuple[Split, ...]:
    wrong = next((i for i, place in enumerate(places) if place.lower() not in _PLACES), None)
    if wrong is not None:
        raise DataError(
            f"{name}: {manifest.named(wrong)} is of the split {places[wrong]!r}. Allowed: train, valid, test."
        )
    own = np.array([_PLACES[place.lower()] for place in places])
    train, valid, test = (np.flatnonzero(own == place) for place in ("train", "valid", "test"))
    if not len(train) or not len(test):
        absent = "train" if not len(train) else "test"
        raise DataError(f"{name}: no clip is of the split {absent!r}, and both train and test are needed.")
    return (Split("test", train, valid if len(valid) else None, test),)


def _absent_classes(labels: Labels, classes: tuple[str, ...], splits: tuple[Split, ...]) -> list[str]:
    """Name the classes that are tested without having been trained on, and refuse a split that trains on one class."""
    notes = []
    for split in splits:
        trained, tested = (_occurring(labels[rows]) for rows in (split.train, split.test))
        if len(trained) < 2:
            raise DataError(
                f"{split.name}: its {len(split.train)} training clips have one class only; are labels and folds the right "
                "columns?"
            )
        lacking = sorted(tested - trained)
        if lacking:
            named = ", ".join(classes[k] for k in lacking[:_SHOWN])
            notes.append(
                f"{split.name}: {len(lacking)} classes are tested that no training clip has: {named}"
            )
    return notes


def _occurring(labels: Labels) -> set[int]:
    present = np.flatnonzero(labels.any(0)) if labels.ndim == 2 else np.unique(labels)
    return set(present.tolist())
