# SPDX-License-Identifier: Apache-2.0
"""The folders of the known tasks, as their publishers pack them, in small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import encoders
import pytest

from masktrain.errors import ConfigError, DataError
from masktrain.evaluation.labels import LabelledSet, read_labelled
from masktrain.evaluation.tasks import TASKS, find_task


def lines(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def esc50(root: Path) -> None:
    rows = [
        (f"{f}-{f}00{k}-A-{k}.wav", f, k, ("dog", "rain")[k], k == 0) for f in range(1, 6) for k in (0, 1)
    ]
    lines(
        root / "meta/esc50.csv",
        "filename,fold,target,category,esc10,src_file,take",
        *(f"{n},{f},{k},{c},{e},{f}00{k},A" for n, f, k, c, e in rows),
    )
    encoders.write_tones(root / "audio", [row[0] for row in rows])


def esc10(root: Path) -> None:
    folders = ("001 - Dog bark", "002 - Rain")
    encoders.write_tones(root, [f"{d}/{f}-{f}0{k}-A.ogg" for f in range(1, 6) for k, d in enumerate(folders)])


def us8k(root: Path) -> None:
    rows = [
        (f"{f}{k}-{k}-0-0.wav", f"{f}{k}", f, k, ("siren", "drilling")[k])
        for f in range(1, 11)
        for k in (0, 1)
    ]
    lines(
        root / "metadata/UrbanSound8K.csv",
        "slice_file_name,fsID,start,end,salience,fold,classID,class",
        *(f"{n},{s},0,1,1,{f},{k},{c}" for n, s, f, k, c in rows),
    )
    encoders.write_tones(root / "audio", [f"fold{f}/{n}" for n, _, f, _, _ in rows])


def speech_commands(root: Path) -> None:
    names = [f"{word}/{who}_nohash_{n}.wav" for word in ("yes", "no") for n, who in enumerate("abcdef")]
    encoders.write_tones(root, [*names, "_background_noise_/hum.wav"])
    lines(root / "validation_list.txt", "yes/c_nohash_2.wav", "no/d_nohash_3.wav")
    lines(root / "testing_list.txt", "yes/a_nohash_0.wav", "no/b_nohash_1.wav")


def vc1(root: Path) -> None:
    names = [f"id1000{k}/video{v}/0000{v}.wav" for k in (1, 2) for v in (1, 2, 3)]
    lines(root / "iden_split.txt", *(f"{v % 3 + 1} {name}" for v, name in enumerate(names)))
    encoders.write_tones(root / "wav", names)


def gtzan(root: Path) -> None:
    for n, place in enumerate(("train", "valid", "test")):
        names = [f"{genre}/{genre}.0000{n}.wav" for genre in ("blues", "metal")]
        lines(root / f"{place}_filtered.txt", *names)
        encoders.write_tones(root / "genres", names)


def nsynth(root: Path) -> None:
    for place in ("train", "valid", "test"):
        names = [f"{family}_{place}_001-060-050" for family in ("bass", "reed")]
        about = {n: {"instrument_family_str": n[:4], "instrument_str": n.rsplit("-", 2)[0]} for n in names}
        lines(root / f"nsynth-{place}/examples.json", json.dumps(about))
        encoders.write_tones(root / f"nsynth-{place}/audio", [f"{n}.wav" for n in names])


def as20k(root: Path) -> None:
    for name in ("balanced_train_segments", "eval_segments"):
        videos = [f"{name[:4]}-{n}" for n in range(4)]
        rows = [f'{v}, 30.000, 40.000, "/m/1{",/m/2" * (n % 2)}"' for n, v in enumerate(videos)]
        lines(
            root / f"{name}.csv",
            "# Segments csv created",
            "# YTID, start_seconds, end_seconds, positive_labels",
            *rows,
        )
        encoders.write_tones(root / name, [f"{videos[0]}.wav", f"Y{videos[1]}.wav", f"{videos[2]}_30.wav"])


def fsd50k(root: Path) -> None:
    truth = root / "FSD50K.ground_truth"
    lines(
        truth / "dev.csv",
        "fname,labels,mids,split",
        '1,"Bark,Dog","/m/a,/m/b",train',
        "2,Rain,/m/c,train",
        "3,Dog,/m/b,val",
    )
    lines(truth / "eval.csv", "fname,labels,mids", '4,"Rain,Bark","/m/c,/m/a"')
    encoders.write_tones(root / "FSD50K.dev_audio", ["1.wav", "2.wav", "3.wav"])
    encoders.write_tones(root / "FSD50K.eval_audio", ["4.wav"])


# clips, classes, splits, (train, valid, test) of the first, groups
CASES: dict[str, tuple[Callable[[Path], None], int, tuple[str, ...], int, tuple[int, int, int], int]] = {
    "esc50": (esc50, 10, ("dog", "rain"), 5, (8, 0, 2), 10),
    "esc10": (esc10, 10, ("Dog bark", "Rain"), 5, (8, 0, 2), 10),
    "us8k": (us8k, 20, ("drilling", "siren"), 10, (18, 0, 2), 20),
    "spcv1": (speech_commands, 12, ("no", "yes"), 1, (8, 2, 2), 6),
    "spcv2": (speech_commands, 12, ("no", "yes"), 1, (8, 2, 2), 6),
    "vc1": (vc1, 6, ("id10001", "id10002"), 1, (2, 2, 2), 3),
    "gtzan": (gtzan, 6, ("blues", "metal"), 1, (2, 2, 2), 0),
    "nsynth": (nsynth, 6, ("bass", "reed"), 1, (2, 2, 2), 6),
    "as20k": (as20k, 6, ("/m/1", "/m/2"), 1, (3, 0, 3), 6),
    "fsd50k": (fsd50k, 4, ("Bark", "Dog", "Rain"), 1, (2, 1, 1), 0),
}


@pytest.mark.parametrize("name", CASES)
def test_a_folder_as_published(name: str, tmp_path: Path) -> None:
    make, clips, classes, splits, sizes, groups = CASES[name]
    make(tmp_path)
    labelled: LabelledSet = read_labelled(tmp_path, task=name)
    assert len(labelled.manifest) == clips and labelled.classes == classes and len(labelled.splits) == splits
    first = labelled.splits[0]
    valid = 0 if first.valid is None else len(first.valid)
    assert (len(first.train), valid, len(first.test)) == sizes
    assert len(set(labelled.groups or ())) == groups
    assert labelled.unit_seconds == TASKS[name].unit_seconds and labelled.metric == TASKS[name].metric
    assert labelled.multilabel == (labelled.metric == "mAP")
    if name == "as20k":
        assert any("2 segments" in note for note in labelled.notes)
        assert labelled.labels.sum(0).tolist() == [6, 2]
    with pytest.raises(DataError, match=r"should hold|cannot be used|None of the clips"):
        read_labelled(tmp_path / "..", task=name)


def test_esc10_out_of_esc50(tmp_path: Path) -> None:
    esc50(tmp_path)
    with pytest.raises(DataError, match="every clip has the label 'dog'"):
        read_labelled(tmp_path, task="esc10")


@pytest.mark.parametrize("name", ("cremad", "voxforge", "surge"))
def test_packings_without_a_split_ask_for_a_manifest(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"evar/metadata/{name}.csv"):
        read_labelled(tmp_path, task=name)
    names = [f"{n}.wav" for n in range(4)]
    encoders.write_tones(tmp_path, names)
    rows = zip(names, "abab", ("train", "train", "valid", "test"), strict=True)
    labelled = read_labelled(
        encoders.write_manifest(tmp_path, list(rows), "file_name,label,split"), task=name
    )
    assert labelled.unit_seconds == TASKS[name].unit_seconds


def test_damaged_lists(tmp_path: Path) -> None:
    lines(tmp_path / "iden_split.txt", "4 id1/v/1.wav")
    with pytest.raises(DataError, match="not those of VoxCeleb1"):
        read_labelled(tmp_path, task="vc1")
    lines(tmp_path / "meta/esc50.csv", "filename,label", "a.wav,dog")
    with pytest.raises(DataError, match="not those of ESC-50"):
        read_labelled(tmp_path, task="esc50")


def test_tasks_are_found_as_people_write_them() -> None:
    for name, key in (("ESC-50", "esc50"), ("Us8K", "us8k"), ("FSD50K", "fsd50k"), ("as20k", "as20k")):
        assert find_task(name) is TASKS[key]
    with pytest.raises(ConfigError, match=r"no task 'ESC-51'.*esc50"):
        find_task("ESC-51")


def test_every_task_of_the_field_is_there() -> None:
    # evar/ds_tasks.py of nttcslab/eval-audio-repr
    units = {"esc50": 5, "us8k": 4, "fsd50k": 7.6358, "gtzan": 30, "nsynth": 4, "cremad": 2.5, "spcv1": 1,
             "spcv2": 1, "surge": 4, "vc1": 8.2, "voxforge": 5.8, "as20k": 10, "esc10": 5}  # fmt: skip
    assert {name: task.unit_seconds for name, task in TASKS.items()} == units
