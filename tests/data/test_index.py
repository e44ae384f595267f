# SPDX-License-Identifier: Apache-2.0
"""Lengths and rates come from the headers; what cannot be used is named, counted, and bounded."""

from __future__ import annotations

import os
import time
import wave
from pathlib import Path

import numpy as np
import pytest

from masktrain.data import index
from masktrain.data.index import index_manifest
from masktrain.data.manifest import BadClip, Manifest, Note, write_canonical
from masktrain.data.readers import load_manifest
from masktrain.errors import DataError


def write_wav(path: Path, samples: int, rate: int = 8000) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, rate, 0, "NONE", ""))
        file.writeframes(bytes(2 * samples))


def read(*paths: Path) -> tuple[Manifest, list[BadClip]]:
    return index_manifest(load_manifest(paths)[0])


def corpus(folder: Path, good: int, bad: int) -> Path:
    """Return a CSV of `good` clips and `bad` files of text, interleaved by name."""
    for i in range(good):
        write_wav(folder / f"{i:04d}.wav", 100 + i, 8000 if i % 2 else 16000)
    for i in range(bad):
        (folder / f"{i:04d}_bad.wav").write_text("no audio")
    names = sorted(p.name for p in folder.glob("*.wav"))
    table = folder / "m.csv"
    table.write_text("path,name\n" + "".join(f"{name},{name[:4]}\n" for name in names))
    return table


def test_headers_are_read_in_order(tmp_path: Path) -> None:
    table = corpus(tmp_path, 300, 0)
    calls: list[tuple[int, int]] = []
    for workers in (1, 3):
        clips, bad = index_manifest(load_manifest([table])[0], lambda *now: calls.append(now), workers)
        assert bad == []
        assert clips.num_samples.tolist() == [100 + i for i in range(300)]
        assert clips.sample_rate.tolist() == [8000 if i % 2 else 16000 for i in range(300)]
        assert clips.num_samples.dtype == np.int64 and clips.sample_rate.dtype == np.int32
    assert calls[-1] == (300, 300) and calls == sorted(calls[: len(calls) // 2]) * 2


def test_bad_clips_are_named_and_left_out(tmp_path: Path) -> None:
    table = corpus(tmp_path, 4, 1)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "spec.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.wav")
    write_wav(tmp_path / "nothing.wav", 0)
    write_wav(tmp_path / "slow.wav", 100, 100)
    named = ["gone.wav", "empty.wav", "spec.npy", "folder", "zero.wav", "pipe.wav", "nothing.wav", "slow.wav"]
    with open(table, "a") as file:
        file.writelines(f"{name},x\n" for name in [*named, "0000.wav/x.wav"])
    begin = time.perf_counter()
    clips, bad = read(table)
    assert time.perf_counter() - begin < 5
    assert list(clips.paths) == ["0000.wav", "0001.wav", "0002.wav", "0003.wav"]
    assert clips.labels["name"] == ["0000", "0001", "0002", "0003"]
    assert [clips.where(i) for i in range(2)] == [f"{table} line 2", f"{table} line 4"]
    reasons = {os.path.relpath(clip.path, tmp_path): clip.reason for clip in bad}
    assert list(reasons) == ["0000_bad.wav", *named, "0000.wav/x.wav"]
    del reasons["0000_bad.wav"]
    assert list(reasons.values()) == [
        "no such file",
        "empty (0 bytes)",
        "a NumPy array, not audio: name the audio that it was made from",
        "not a regular file",
        "not a regular file",
        "not a regular file",
        "has no samples",
        "sample rate 100 Hz; allowed are 1000 to 768000 Hz",
        "cannot be read: Not a directory",
    ]
    assert str(bad[1]) == f"{tmp_path}/gone.wav ({table} line 7): no such file"


def test_too_many_bad_clips_stop(tmp_path: Path) -> None:
    clips, bad = read(corpus(tmp_path / "few", 20, 10))
    assert (len(clips), len(bad)) == (20, 10)
    with pytest.raises(
        DataError, match=r"11 of 31 clips cannot be used; at most 10 may be.*0000_bad\.wav \(.*line 3\)"
    ):
        read(corpus(tmp_path / "many", 20, 11))


def test_no_usable_clip_stops(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 of 3 clips cannot be used"):
        read(corpus(tmp_path, 0, 3))


@pytest.mark.parametrize("header", ["path\n", "path\tnum_samples\tsample_rate_hz\n"])
def test_all_absent_stops(tmp_path: Path, header: str) -> None:
    table = tmp_path / "m.tsv"
    cells = "\t800\t8000" if "\t" in header else ""
    table.write_text(header + "".join(f"x/{i}.wav{cells}\n" for i in range(3)))
    with pytest.raises(
        DataError, match=r"None of the clips exists.*x/0\.wav \(.*line 2\).*folder of the manifest"
    ):
        read(table)
    table.write_text(header + f"~/audio/0.wav{cells}\n")
    with pytest.raises(DataError, match="'~' is not expanded"):
        read(table)


def test_canonical_manifest_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, _ = read(corpus(tmp_path, 20, 0))
    write_canonical(clips, tmp_path / "index.tsv")

    def refuse(path: str) -> None:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr(index, "probe", refuse)
    again, bad = read(tmp_path / "index.tsv")
    assert bad == [] and again.digest == clips.digest
    assert again.num_samples.tolist() == clips.num_samples.tolist()
    # what is absent or empty by now is still named
    (tmp_path / "0003.wav").unlink()
    text = (tmp_path / "index.tsv").read_text().replace("0005.wav\t105\t", "0005.wav\t0\t")
    (tmp_path / "index.tsv").write_text(text)
    again, bad = read(tmp_path / "index.tsv")
    assert [(Path(clip.path).name, clip.reason) for clip in bad] == [
        ("0003.wav", "no such file"),
        ("0005.wav", "has no samples"),
    ]
    assert len(again) == 18


def test_the_header_is_believed_where_a_manifest_differs(tmp_path: Path) -> None:
    for name, samples in (("a", 1000), ("b", 1009), ("c", 2000)):
        write_wav(tmp_path / f"{name}.wav", samples)
    table = tmp_path / "train.tsv"
    table.write_text(f"{tmp_path}\na.wav\t1000\nb.wav\t1000\nc.wav\t1000\n")
    notes: list[Note] = []
    clips, bad = index_manifest(load_manifest([table])[0], notes=notes)
    assert bad == [] and clips.num_samples.tolist() == [1000, 1009, 2000]
    assert [note.count for note in notes] == [1]
    assert f"c.wav ({table} line 4): 1000, header 2000" in notes[0].text


def test_a_fault_of_ours_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = corpus(tmp_path, 200, 0)

    def fail(path: str) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(index, "probe", fail)
    with pytest.raises(ZeroDivisionError):
        read(table)


def test_real_audio(data_dir: Path) -> None:
    """The corpora as their description has them: 400 + 3000 clips, 0.92 hours, two sample rates."""
    clips, bad = read(data_dir / "esc10.csv", data_dir / "fsdd.csv")
    assert (len(clips), bad) == (3400, [])
    assert np.unique(clips.sample_rate, return_counts=True)[1].tolist() == [3000, 400]
    assert clips.seconds / 3600 == pytest.approx(0.92, abs=0.005)
    # two of the 5 s clips of ESC-10 are longer, one is shorter
    assert 0.1 < clips.durations.min() < 0.2 and clips.durations.max() == pytest.approx(7.24, abs=0.01)
    assert clips.labels["speaker"][:400] == [""] * 400 and len(set(clips.labels["speaker"][400:])) == 6
