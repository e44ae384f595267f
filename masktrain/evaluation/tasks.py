# SPDX-License-Identifier: Apache-2.0
"""The tasks of the field: how the data that the user brings lies in its folder, the official folds or splits, the length
of the units and the metric.

Unit lengths and splits are those of nttcslab/eval-audio-repr (evar/ds_tasks.py, evar/utils/make_metadata.py). A task's
folder is read as its publisher packs it. Where the official packing has no split (CREMA-D, VoxForge, Surge), and
wherever it is handier, a manifest with `label` and `fold` or `split` serves for a task as well: EVAR's metadata CSV, put
into the folder that its file names count from, is one.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from masktrain.errors import ConfigError, DataError, nearest

Metric = Literal["accuracy", "mAP"]
Rule = Literal["fold", "split"]


@dataclass
class Table:
    """Rows as a task's own files have them. paths: below the task's folder. labels: one or several of each clip. places:
    fold or split of each. groups: speaker or source of each, "" where it is not known."""

    paths: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, path: str, labels: str | tuple[str, ...], place: str, group: str = "") -> None:
        """Add a clip."""
        self.paths.append(path)
        self.labels.append((labels,) if isinstance(labels, str) else labels)
        self.places.append(place)
        self.groups.append(group)


@dataclass(frozen=True)
class Task:
    """One task. folds: of cross validation, where rule is "fold". layout: what its folder holds, in words. read: of that
    folder; None where the published packing tells no split."""

    name: str
    title: str
    rule: Rule
    folds: int | None
    unit_seconds: float
    metric: Metric
    layout: str
    read: Callable[[Path], Table] | None = None


def find_task(name: str) -> Task:
    """Return the task called `name`, whatever its case and hyphens (ESC-50). Raises ConfigError."""
    plain = "".join(c for c in name.lower() if c.isalnum())
    if plain not in TASKS:
        raise ConfigError(f"--task: no task {name!r}.{nearest(plain, TASKS)} Allowed: {', '.join(TASKS)}.")
    return TASKS[plain]


def read_folder(task: Task, root: Path) -> Table:
    """Return the clips of a task's folder. Raises DataError where it does not lie as the publisher packs it."""
    if task.read is None:
        raise DataError(
            f"--task {task.name}: the packing of {task.title} tells no split. Give a manifest with path, label and split "
            f"(nttcslab/eval-audio-repr has them as evar/metadata/{task.name}.csv); its paths count from its own folder."
        )
    try:
        table = task.read(root)
    except OSError as error:
        raise DataError(
            f"--task {task.name}: {error.filename}: {error.strerror}. {root} should hold {task.layout}."
        ) from error
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(
            f"--task {task.name}: the lists in {root} are not those of {task.title} ({type(error).__name__}: {error}). "
            f"It should hold {task.layout}."
        ) from error
    if not table.paths:
        raise DataError(f"--task {task.name}: {root} holds none of its clips. It should hold {task.layout}.")
    return table


def _csv(path: Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _esc50(root: Path) -> Table:
    table = Table()
    for row in _csv(root / "meta" / "esc50.csv"):
        table.add(f"audio/{row['filename']}", row["category"], row["fold"], row.get("src_file") or "")
    return table


def _esc10(root: Path) -> Table:
    table = Table()
    if (root / "meta" / "esc50.csv").exists():
        for row in _csv(root / "meta" / "esc50.csv"):
            if row["esc10"].lower() == "true":
                table.add(f"audio/{row['filename']}", row["category"], row["fold"], row.get("src_file") or "")
        return table
    # the older packing, "001 - Dog bark/1-100032-A.ogg": fold, Freesound id, take
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and " - " in p.name):
        for file in sorted(folder.glob("*.ogg")):
            fold, source = file.stem.split("-")[:2]
            table.add(f"{folder.name}/{file.name}", folder.name.split(" - ", 1)[1], fold, source)
    return table


def _us8k(root: Path) -> Table:
    table = Table()
    for row in _csv(root / "metadata" / "UrbanSound8K.csv"):
        path = f"audio/fold{row['fold']}/{row['slice_file_name']}"
        table.add(path, row["class"], row["fold"], row["fsID"])
    return table


def _speech_commands(root: Path) -> Table:
    held = dict.fromkeys(_lines(root / "validation_list.txt"), "valid")
    held |= dict.fromkeys(_lines(root / "testing_list.txt"), "test")
    table = Table()
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))):
        for file in sorted(folder.glob("*.wav")):
            name = f"{folder.name}/{file.name}"
            table.add(name, folder.name, held.get(name, "train"), file.stem.split("_nohash_")[0])
    return table


def _voxceleb1(root: Path) -> Table:
    table = Table()
    for line in _lines(root / "iden_split.txt"):
        place, name = line.split()
        speaker, video = name.split("/")[:2]
        table.add(f"wav/{name}", speaker, {"1": "train", "2": "valid", "3": "test"}[place], video)
    return table


def _gtzan(root: Path) -> Table:
    table = Table()
    folder = "genres/" if (root / "genres").is_dir() else ""
    for place in ("train", "valid", "test"):
        for name in _lines(root / f"{place}_filtered.txt"):
            table.add(f"{folder}{name}", name.split("/")[0], place)
    return table


def _nsynth(root: Path) -> Table:
    table = Table()
    for place in ("train", "valid", "test"):
        folder = f"nsynth-{place}"
        examples = json.loads((root / folder / "examples.json").read_text(encoding="utf-8"))
        for name, about in examples.items():
            path = f"{folder}/audio/{name}.wav"
            table.add(path, about["instrument_family_str"], place, about["instrument_str"])
    return table


def _audioset(root: Path) -> Table:
    table, absent = Table(), 0
    for list_name, place in (("balanced_train_segments", "train"), ("eval_segments", "test")):
        there = {stem: name for name in os.listdir(root / list_name) for stem in [os.path.splitext(name)[0]]}
        for line in _lines(root / f"{list_name}.csv"):
            if line.startswith("#"):
                continue
            video, start, _, labels = line.split(", ", 3)
            names = (video, f"Y{video}", f"{video}_{float(start):g}", f"Y{video}_{float(start):.3f}")
            found = next((there[name] for name in names if name in there), None)
            if found is None:
                absent += 1
                continue
            table.add(f"{list_name}/{found}", tuple(labels.strip('"').split(",")), place, video)
    if absent:
        table.notes.append(f"{absent} segments of the lists have no file and are left out")
    return table


def _fsd50k(root: Path) -> Table:
    table = Table()
    truth = root / "FSD50K.ground_truth"
    for row in _csv(truth / "dev.csv"):
        place = {"train": "train", "val": "valid"}[row["split"]]
        table.add(f"FSD50K.dev_audio/{row['fname']}.wav", tuple(row["labels"].split(",")), place)
    for row in _csv(truth / "eval.csv"):
        table.add(f"FSD50K.eval_audio/{row['fname']}.wav", tuple(row["labels"].split(",")), "test")
    return table


_SPC = "a folder for each word, validation_list.txt and testing_list.txt"
_ALL: tuple[tuple[Any, ...], ...] = (
    ("esc50", "ESC-50", "fold", 5, 5.0, "accuracy", "meta/esc50.csv and audio/", _esc50),
    (
        "esc10",
        "ESC-10",
        "fold",
        5,
        5.0,
        "accuracy",
        "meta/esc50.csv and audio/ of ESC-50, or the folders '001 - Dog bark' to '010 - ...' of ESC-10",
        _esc10,
    ),
    (
        "us8k",
        "UrbanSound8K",
        "fold",
        10,
        4.0,
        "accuracy",
        "metadata/UrbanSound8K.csv and audio/fold1 to audio/fold10",
        _us8k,
    ),
    ("spcv1", "Speech Commands 1", "split", None, 1.0, "accuracy", _SPC, _speech_commands),
    ("spcv2", "Speech Commands 2", "split", None, 1.0, "accuracy", _SPC, _speech_commands),
    (
        "vc1",
        "VoxCeleb1, speaker identification",
        "split",
        None,
        8.2,
        "accuracy",
        "iden_split.txt and wav/",
        _voxceleb1,
    ),
    ("voxforge", "VoxForge, language", "split", None, 5.8, "accuracy", "", None),
    ("cremad", "CREMA-D", "split", None, 2.5, "accuracy", "", None),
    (
        "gtzan",
        "GTZAN, fault-filtered",
        "split",
        None,
        30.0,
        "accuracy",
        "a folder for each genre (or genres/ with them) and train_filtered.txt, valid_filtered.txt, test_filtered.txt of "
        "jongpillee/music_dataset_split",
        _gtzan,
    ),
    (
        "nsynth",
        "NSynth, instrument family",
        "split",
        None,
        4.0,
        "accuracy",
        "nsynth-train, nsynth-valid and nsynth-test, each with examples.json and audio/",
        _nsynth,
    ),
    ("surge", "Surge, pitch", "split", None, 4.0, "accuracy", "", None),
    (
        "as20k",
        "AudioSet-20K",
        "split",
        None,
        10.0,
        "mAP",
        "balanced_train_segments.csv and eval_segments.csv with a folder of audio for each, named by video id",
        _audioset,
    ),
    (
        "fsd50k",
        "FSD50K",
        "split",
        None,
        7.6358,
        "mAP",
        "FSD50K.ground_truth, FSD50K.dev_audio and FSD50K.eval_audio",
        _fsd50k,
    ),
)
TASKS: dict[str, Task] = {row[0]: Task(*row) for row in _ALL}
