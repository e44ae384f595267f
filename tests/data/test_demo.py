# SPDX-License-Identifier: Apache-2.0
"""The demo corpus: the same samples for the same seed, whole or not there, and with structure to learn."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from masktrain.data.demo import CLIPS, RATES, clip, make_demo
from masktrain.data.index import index_manifest
from masktrain.data.readers import load_manifest
from masktrain.data.synth import KINDS
from masktrain.errors import DataError


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of a corpus; tests leave it whole."""
    return make_demo(tmp_path_factory.mktemp("demo"))


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {entry.name: (entry.stat().st_size, entry.stat().st_mtime_ns) for entry in os.scandir(folder)}


def test_corpus(demo: Path) -> None:
    clips, bad = index_manifest(load_manifest([demo])[0])
    assert (len(clips), bad) == (CLIPS, [])
    assert Counter(clips.labels["label"]) == dict.fromkeys(KINDS, CLIPS // len(KINDS))
    pairs = Counter(zip(clips.labels["label"], clips.labels["fold"], strict=True))
    assert set(pairs.values()) == {CLIPS // len(KINDS) // 5}
    assert Counter(clips.sample_rate.tolist()) == dict.fromkeys(RATES, CLIPS // len(RATES))
    assert Counter(os.path.splitext(path)[1] for path in clips.paths).keys() == {".flac", ".wav", ".ogg"}
    assert 0.5 <= clips.durations.min() < 0.6 and 7 < clips.durations.max() <= 8
    assert sum(size for size, _ in state(demo.parent).values()) < 60e6


def test_files_hold_the_samples(demo: Path) -> None:
    """FLAC and WAV bit for bit; Vorbis within its loss, at full length."""
    entries, _ = load_manifest([demo])
    channels = set()
    for number in range(0, CLIPS, 7 * 3 + 2):
        samples, rate = clip(0, number)
        held, held_rate = soundfile.read(entries.path(number), dtype="int16", always_2d=True)
        assert (held.shape, held_rate) == (samples.shape, rate)
        channels.add(samples.shape[1])
        if entries.path(number).endswith(".ogg"):
            error = np.square(held / 32768 - samples / 32768).mean()
            assert error < 0.2 * np.square(samples / 32768).mean()
        else:
            assert np.array_equal(held, samples)
    assert channels == {1, 2}


def test_samples_depend_on_seed_and_number_alone() -> None:
    for number in (0, 3, 11):
        first, rate = clip(5, number)
        again, _ = clip(5, number)
        assert np.array_equal(first, again) and first.dtype == np.int16
        other, _ = clip(6, number)
        assert first.shape != other.shape or not np.array_equal(first, other)
        assert rate == RATES[number % len(RATES)]
    code = "from masktrain.data.demo import clip; print(clip(5, 11)[0].tobytes().hex())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert bytes.fromhex(fresh.stdout) == clip(5, 11)[0].tobytes()


def test_levels_are_those_of_recordings() -> None:
    for number in range(0, CLIPS, 10):
        samples, _ = clip(0, number)
        peak = np.abs(samples.astype(np.int32)).max() / 32767
        assert 0.09 < peak < 0.9 and np.isfinite(samples).all()


def test_clips_have_structure_in_time_and_frequency() -> None:
    """In most clips neither a frame nor a bin is told by its mean over the other axis.

    The log spectrum (25 ms windows, down to 60 dB below its maximum) has variance left after the mean
    spectrum is taken away, and after the mean level of each frame is.
    """
    left_in_time, left_in_frequency = [], []
    for number in range(0, CLIPS, 3):
        samples, rate = clip(0, number)
        size = rate // 40
        frames = samples[: len(samples) // size * size, 0].reshape(-1, size) * np.hanning(size)
        power = np.square(np.abs(np.fft.rfft(frames)))
        log = np.log(np.maximum(power, power.max() * 1e-6))
        left_in_time.append((log - log.mean(axis=0)).std())
        left_in_frequency.append((log - log.mean(axis=1, keepdims=True)).std())
    assert np.median(left_in_time) > 1.2 and np.median(left_in_frequency) > 1.2


def test_made_once(demo: Path) -> None:
    before = state(demo.parent)
    assert make_demo(demo.parent.parent) == demo
    assert state(demo.parent) == before


@pytest.mark.parametrize("damage", ["absent", "short", "no record", "no manifest"])
def test_a_damaged_corpus_is_made_again(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = tmp_path / "demo-0"
    folder.mkdir()
    for entry in os.scandir(demo.parent):
        os.link(entry.path, folder / entry.name)
    victim = {"no record": "corpus.json", "no manifest": "demo.csv"}.get(damage, "tone_000.flac")
    (folder / victim).unlink()
    if damage == "short":
        (folder / victim).write_bytes((demo.parent / victim).read_bytes()[:-1])
    written = []

    def copy(into: Path, seed: int) -> None:
        written.append(seed)
        for entry in os.scandir(demo.parent):
            os.link(entry.path, into / entry.name)

    monkeypatch.setattr("masktrain.data.demo._write", copy)
    assert make_demo(tmp_path) == folder / "demo.csv"
    assert written == [0]
    assert state(folder).keys() == state(demo.parent).keys()
    assert os.listdir(tmp_path) == ["demo-0"]


def test_an_interrupted_making_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(into: Path, seed: int) -> None:
        (into / "demo.csv").write_text("path\n")
        raise KeyboardInterrupt

    monkeypatch.setattr("masktrain.data.demo._write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path)
    assert os.listdir(tmp_path) == []


def test_another_process_came_first(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(into: Path, seed: int) -> None:
        for folder in (tmp_path / "demo-0", into):
            folder.mkdir(exist_ok=True)
            for entry in os.scandir(demo.parent):
                os.link(entry.path, folder / entry.name)

    monkeypatch.setattr("masktrain.data.demo._write", both)
    assert make_demo(tmp_path) == tmp_path / "demo-0" / "demo.csv"
    assert os.listdir(tmp_path) == ["demo-0"]


def test_what_is_not_ours_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("masktrain.data.demo._write", lambda into, seed: None)
    (tmp_path / "demo-0").mkdir()
    (tmp_path / "demo-0" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match=r"demo-0: not a whole demo corpus.*thesis\.tex"):
        make_demo(tmp_path)
    assert (tmp_path / "demo-0" / "thesis.tex").read_text() == "years of work"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        make_demo(tmp_path / "file")
