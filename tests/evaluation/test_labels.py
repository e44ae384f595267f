# SPDX-License-Identifier: Apache-2.0
"""Labels, folds and splits of manifests, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

import encoders
import numpy as np
import pytest

from masktrain.errors import ConfigError, DataError
from masktrain.evaluation.labels import read_labelled

NAMES = [f"{i}.wav" for i in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    encoders.write_tones(root, NAMES)
    return root


def manifest(folder: Path, columns: str, *values: str) -> Path:
    """values: for each column its six values, blank between them."""
    rows = zip(NAMES, *(value.split(" ") for value in values), strict=True)
    return encoders.write_manifest(folder, list(rows), f"path,{columns}")


def test_folds(folder: Path) -> None:
    data = manifest(folder, "label,fold", "b a b a b a", "2 2 10 10 1 1")
    labelled = read_labelled(data)
    assert labelled.classes == ("a", "b") and labelled.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert [s.name for s in labelled.splits] == ["fold 1", "fold 2", "fold 10"]
    for split, test in zip(labelled.splits, ([4, 5], [0, 1], [2, 3]), strict=True):
        assert split.test.tolist() == test and split.valid is None
        assert sorted([*split.train, *split.test]) == list(range(6))
    assert labelled.metric == "accuracy" and labelled.unit_seconds is None and labelled.groups is None


def test_splits_groups_and_numeric_classes(folder: Path) -> None:
    data = manifest(
        folder, "digit,speaker,split", "10 9 9 10 9 10", "x y x y x z", "train train validation Val TEST test"
    )
    labelled = read_labelled(data)
    assert labelled.classes == ("9", "10") and labelled.labels.tolist() == [1, 0, 0, 1, 0, 1]
    (split,) = labelled.splits
    assert (split.train.tolist(), split.valid.tolist(), split.test.tolist()) == ([0, 1], [2, 3], [4, 5])
    assert labelled.groups == ("x", "y", "x", "y", "x", "z")


def test_chosen_columns(folder: Path) -> None:
    data = manifest(
        folder, "label,kind,fold,part", "a a a a a a", "u v u v u v", "1 1 1 2 2 2", "1 2 3 1 2 3"
    )
    labelled = read_labelled(data, label="kind", fold="part")
    assert labelled.classes == ("u", "v") and len(labelled.splits) == 3


def test_several_labels(folder: Path) -> None:
    data = manifest(
        folder,
        "label,split",
        "dog;rain rain dog cat;dog dog;rain;rain cat",
        "train train train train test test",
    )
    labelled = read_labelled(data)
    assert labelled.classes == ("cat", "dog", "rain") and labelled.metric == "mAP" and labelled.multilabel
    assert labelled.labels.dtype == np.uint8
    assert labelled.labels.tolist() == [[0, 1, 1], [0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_rows_of_no_split_are_left_out(folder: Path) -> None:
    data = manifest(folder, "label,split", "a b a b a b", "train train  test test ")
    labelled = read_labelled(data)
    assert len(labelled.manifest) == 4 and labelled.labels.tolist() == [0, 1, 1, 0]
    assert any("2 clips have no split" in note for note in labelled.notes)


def test_classes_that_were_not_trained_on_are_named(folder: Path) -> None:
    data = manifest(folder, "label,split", "a b a b c a", "train train train train test test")
    assert any("tested that no training clip has: c" in note for note in read_labelled(data).notes)


def test_an_index_column_without_a_name(folder: Path) -> None:
    # nttcslab/eval-audio-repr writes some of its metadata so
    path = folder / "evar.csv"
    rows = [f"{i},{name},{'ab'[i % 2]},{'train' if i < 4 else 'test'}" for i, name in enumerate(NAMES)]
    path.write_text("\n".join([",file_name,label,split", *rows]) + "\n")
    assert read_labelled(path).labels.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("columns", "values", "options", "error", "words"),
    [
        ("label,fold", ("a b a b  b", "1 1 1 2 2 2"), {}, DataError, "1 of 6 clips have no label"),
        ("label,fold", ("a a a a a a", "1 1 1 2 2 2"), {}, DataError, "every clip has the label 'a'"),
        ("label,fold", ("a b a b a b", "1 1 1 1 1 1"), {}, DataError, "at least two folds"),
        ("label,fold", ("a b a b a b", "1 1 1 2 2 2"), {"task": "esc10"}, DataError, "official ones are 5"),
        ("label,fold", ("a b a b a b", "1 1 1 2 2 2"), {"task": "esc"}, ConfigError, "Did you mean 'esc"),
        ("label,fold", ("a b a b a b", "1 1 1 2 2 2"), {"task": "gtzan"}, DataError, "no column split"),
        ("label,other", ("a b a b a b", "1 1 1 2 2 2"), {}, DataError, "nothing is split at random"),
        ("one,two,fold", ("a b a b a b", "1 1 1 2 2 2", "1 1 1 2 2 2"), {}, ConfigError, "Name it with --label"),
        ("label,fold", ("a b a b a b", "1 1 1 2 2 2"), {"label": "lable"}, ConfigError, "Did you mean 'label'"),
        ("label,fold", ("a b a b a b", "1 1 1 2 2 2"), {"fold": "x"}, ConfigError, "no such column"),
        ("label,split", ("a b a b a b", "train x train train test test"), {}, DataError, "of the split 'x'"),
        ("label,split", ("a b a b a b", "train train train train valid valid"), {}, DataError, "split 'test'"),
        ("label,split", ("a a a a b a", "train train train train test test"), {}, DataError, "one class only"),
        ("fold,split,label", ("1 1 1 2 2 2", "train train train test test test", "a b a b a b"), {}, ConfigError, "which one counts"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated(
    folder: Path, columns: str, values: tuple[str, ...], options: dict[str, str], error: type, words: str
) -> None:
    with pytest.raises(error, match=words):
        read_labelled(manifest(folder, columns, *values), **options)


def test_a_file_named_twice_is_refused(folder: Path) -> None:
    rows = [*((name, "ab"[i % 2], "train") for i, name in enumerate(NAMES)), (f"./{NAMES[0]}", "a", "test")]
    with pytest.raises(DataError, match="name each file once"):
        read_labelled(encoders.write_manifest(folder, rows, "path,label,split"))


def test_a_clip_that_cannot_be_read_stops(folder: Path) -> None:
    rows = [(name, "ab"[i % 2], i % 3) for i, name in enumerate([*NAMES, "absent.wav"])]
    with pytest.raises(DataError, match=r"1 of 7 labelled clips cannot be used: .*absent\.wav .*line 8"):
        read_labelled(encoders.write_manifest(folder, rows))


def test_no_labels_at_all(folder: Path) -> None:
    with pytest.raises(DataError, match="holds no labels"):
        read_labelled(folder)


def test_real_manifests(data_dir: Path) -> None:
    esc, fsdd = read_labelled(data_dir / "esc10.csv", task="esc10"), read_labelled(data_dir / "fsdd.csv")
    assert len(esc.classes) == 10 and [len(s.test) for s in esc.splits] == [80] * 5
    assert esc.unit_seconds == 5.0
    assert fsdd.classes == tuple(map(str, range(10)))
    assert [(len(s.train), len(s.test)) for s in fsdd.splits] == [(2700, 300)]
    assert len(set(fsdd.groups)) == 6
