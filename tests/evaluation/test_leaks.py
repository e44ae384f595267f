# SPDX-License-Identifier: Apache-2.0
"""Files, audio and speakers on two sides of a split."""

from __future__ import annotations

import os
from pathlib import Path

import encoders
import numpy as np
import pytest
import soundfile

from masktrain.errors import DataError
from masktrain.evaluation.labels import read_labelled
from masktrain.evaluation.leaks import audio_digest, check_leaks

HEADER = "path,label,speaker,split"
PLACES = ("train", "train", "train", "valid", "test", "test")


def folder(root: Path) -> Path:
    encoders.write_tones(root, [f"{n}.wav" for n in range(6)])
    return root


def check(root: Path, names: list[str], speakers: str = "uvwxyz") -> tuple[str, ...]:
    rows = [(n, "ab"[i % 2], s, p) for i, (n, s, p) in enumerate(zip(names, speakers, PLACES, strict=True))]
    return check_leaks(read_labelled(encoders.write_manifest(root, rows, HEADER)))


def test_what_is_clean(tmp_path: Path) -> None:
    names = [f"{n}.wav" for n in range(6)]
    assert check(folder(tmp_path), names) == ()


def test_shared_speakers_are_named(tmp_path: Path) -> None:
    notes = check(folder(tmp_path), [f"{n}.wav" for n in range(6)], "uvwxuv")
    assert len(notes) == 1 and "2 of 2 speakers or sources in test are in train as well: u, v" in notes[0]


@pytest.mark.parametrize("link", (os.symlink, os.link))
def test_the_same_file_under_another_name(tmp_path: Path, link: object) -> None:
    link(folder(tmp_path) / "0.wav", tmp_path / "other.wav")
    with pytest.raises(DataError, match=r"the same file is in train and in test.*0\.wav.*other\.wav"):
        check(tmp_path, ["0.wav", "1.wav", "2.wav", "3.wav", "4.wav", "other.wav"])


@pytest.mark.parametrize(("place", "where"), [(5, "train and in test"), (3, "train and in valid")])
def test_the_same_audio_in_another_container(tmp_path: Path, place: int, where: str) -> None:
    samples, rate = soundfile.read(folder(tmp_path) / "0.wav", dtype="int16")
    # the channels of a stereo file are averaged
    soundfile.write(tmp_path / "copy.flac", np.stack([samples, samples], 1), rate)
    names = [f"{n}.wav" for n in range(6)]
    names[place] = "copy.flac"
    with pytest.raises(DataError, match=rf"identical audio is in {where}, 1 times"):
        check(tmp_path, names)


def test_copies_on_one_side_and_silence_are_no_leak(tmp_path: Path) -> None:
    samples, rate = soundfile.read(folder(tmp_path) / "0.wav", dtype="int16")
    soundfile.write(tmp_path / "1.wav", samples, rate)
    for name in ("2.wav", "4.wav"):
        soundfile.write(tmp_path / name, np.zeros(4800, dtype=np.int16), rate)
    # the same shape as another with one sample off
    samples[100] += 1
    soundfile.write(tmp_path / "5.wav", samples, rate)
    assert check(tmp_path, [f"{n}.wav" for n in range(6)]) == ()


def test_digest() -> None:
    wave = encoders.tone(0.1, 8000, 1)
    assert audio_digest(wave) == audio_digest(wave + np.float32(1e-9)) != audio_digest(wave[::-1])
    assert audio_digest(np.zeros(10, dtype=np.float32)) is None


def test_real_speakers(data_dir: Path) -> None:
    (note,) = check_leaks(read_labelled(data_dir / "fsdd.csv"))
    assert "6 of 6 speakers" in note


@pytest.mark.slow(covers=["masktrain/evaluation/leaks.py", "masktrain/evaluation/labels.py"])
def test_official_folds_are_clean(data_dir: Path) -> None:
    assert check_leaks(read_labelled(data_dir / "esc10.csv")) == ()
    assert check_leaks(read_labelled(data_dir / "esc10", task="esc10")) == ()
