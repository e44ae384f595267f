# SPDX-License-Identifier: Apache-2.0
"""Manifests of every form are read to the same clips; what is wrong with one is said in one message."""

from __future__ import annotations

import json
import os
import time
import wave
from pathlib import Path

import numpy as np
import pytest

from masktrain.data.manifest import UNKNOWN, Manifest, Source, too_many, write_canonical
from masktrain.data.readers import AUDIO_SUFFIXES, PATH_COLUMNS, load_manifest
from masktrain.errors import DataError


def paths_of(*named: Path | str) -> list[str]:
    entries, notes = load_manifest(named)
    assert notes == []
    return [entries.path(i) for i in range(len(entries))]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def manifest(root: str, paths: list[str], **labels: list[str]) -> Manifest:
    count = len(paths)
    return Manifest(
        root=root,
        paths=paths,
        num_samples=np.arange(1, count + 1, dtype=np.int64) * 1000,
        sample_rate=np.full(count, 16000, dtype=np.int32),
        labels=labels,
        sources=[Source("x.tsv", "line")],
        source=np.zeros(count, dtype=np.int32),
        rows=np.arange(2, count + 2, dtype=np.int64),
    )


# ------------------------------------------------------------------------------------------------ every form


@pytest.mark.parametrize("header", [*PATH_COLUMNS, "Path", " FILE_NAME "])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_table(tmp_path: Path, header: str, delimiter: str) -> None:
    lines = [("label", header, "fold"), ("dog", "a b/ü.wav", "1"), ("", "/abs/c.flac", "2")]
    file = write(tmp_path / "m.csv", "\n".join(delimiter.join(line) for line in lines))
    entries, notes = load_manifest([file])
    assert [entries.path(i) for i in range(2)] == [str(tmp_path / "a b/ü.wav"), "/abs/c.flac"]
    assert entries.labels == {"label": ["dog", ""], "fold": ["1", "2"]}
    assert (entries.num_samples == UNKNOWN).all() and (entries.sample_rate == UNKNOWN).all()
    assert [entries.where(i) for i in range(2)] == [f"{file} line 2", f"{file} line 3"]
    assert notes == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xef\xbb\xbfpath,label\r\na.wav,x\r\n\r\nb.wav,y\r\n", ["a.wav", "b.wav"]),
        (b'path,label\n"a, b.wav","x ""y"""\n\n', ["a, b.wav"]),
        (b'path,label\n"line\nbreak.wav",x\nb.wav,y', ["line\nbreak.wav", "b.wav"]),
        (b"\n\n  \nlabel, path\nx, a.wav\n   \n", ["a.wav"]),
        (b"path\n\n \na.wav\n", ["a.wav"]),
        (b",path,label\n0,a.wav,x\n1,b.wav,y\n", ["a.wav", "b.wav"]),
        (b"~/a.wav\n~b.wav\n", ["~/a.wav", "~b.wav"]),
        (b"a.WAV\n\nb, c.ogg\nno suffix\n", ["a.WAV", "b, c.ogg", "no suffix"]),
    ],
)
def test_text_as_people_write_it(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    file = write(tmp_path / "m.csv", content)
    assert paths_of(file) == [os.path.join(tmp_path, path) for path in expected]


def test_line_numbers_count_blank_lines_and_broken_cells(tmp_path: Path) -> None:
    file = write(tmp_path / "m.csv", 'path,label\n\na.wav,"two\nlines"\n\nb.wav,x\n')
    entries, _ = load_manifest([file])
    assert entries.rows.tolist() == [3, 6]


def test_canonical_lengths(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.tsv", "path\tnum_samples\tsample_rate_hz\tlabel\na.wav\t80000\t8000\tx\nb.wav\t\t\ty\n"
    )
    entries, _ = load_manifest([file])
    assert entries.num_samples.tolist() == [80000, UNKNOWN]
    assert entries.sample_rate.tolist() == [8000, UNKNOWN]
    assert entries.labels == {"label": ["x", "y"]}


def test_ast_json(tmp_path: Path) -> None:
    data = [
        {"wav": "/x/a.flac", "labels": "/m/1,/m/2", "id": 3},
        {"wav": "b.wav", "labels": ["p", "q"], "split": None, "nested": {"k": [1, "ü"]}},
    ]
    file = write(tmp_path / "m.json", b"\xef\xbb\xbf" + json.dumps({"data": data}, indent=1).encode())
    entries, _ = load_manifest([file])
    assert [entries.path(i) for i in range(2)] == ["/x/a.flac", str(tmp_path / "b.wav")]
    assert entries.labels == {
        "labels": ["/m/1,/m/2", "p,q"],
        "id": ["3", ""],
        "split": ["", ""],
        "nested": ["", '{"k": [1, "ü"]}'],
    }
    assert entries.where(1) == f"{file} entry 2"
    # known by its content where the suffix does not say it
    assert paths_of(write(tmp_path / "m.manifest", file.read_bytes()))[0] == "/x/a.flac"


@pytest.mark.parametrize("root", ["absolute", "relative"])
def test_fairseq(tmp_path: Path, root: str) -> None:
    first = str(tmp_path / "audio") if root == "absolute" else "../audio"
    file = write(tmp_path / "lists" / "train.tsv", f"{first}\na/b.flac\t32000\nc,d.wav\t16000\n")
    entries, notes = load_manifest([file])
    assert [entries.path(i) for i in range(2)] == [
        str(tmp_path / "audio/a/b.flac"),
        str(tmp_path / "audio/c,d.wav"),
    ]
    assert entries.num_samples.tolist() == [32000, 16000]
    assert entries.sample_rate.tolist() == [UNKNOWN, UNKNOWN]
    assert entries.where(1) == f"{file} line 3" and notes == []


def test_folder(tmp_path: Path) -> None:
    names = [f"b/x{suffix}" for suffix in AUDIO_SUFFIXES] + ["a/Y.WAV", "z.wav", "a/deep/er/ö.flac"]
    for name in [*names, "notes.txt", ".hidden.wav", ".git/x.wav"]:
        write(tmp_path / name, b"x")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "self.wav").symlink_to(tmp_path / "self.wav")
    (tmp_path / "gone.wav").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.wav")
    entries, notes = load_manifest([tmp_path])
    # links that lead nowhere and pipes are listed, for the index to name them
    assert sorted(entries.paths) == sorted([*names, "self.wav", "gone.wav", "pipe.wav"])
    assert list(entries.paths) == list(load_manifest([tmp_path])[0].paths)
    assert entries.where(0) == str(tmp_path) and notes == []


def test_folder_names_what_it_leaves_out(tmp_path: Path) -> None:
    for name in (b"a.wav", b"b.m4a", b"c.M4A", b"bad\xff.wav"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
            pass
    entries, notes = load_manifest([tmp_path])
    assert list(entries.paths) == ["a.wav"]
    assert [note.count for note in notes] == [2, 1]
    assert "b.m4a" in notes[0].text and "not UTF-8" in notes[1].text and r"bad\udcff.wav" in notes[1].text


def test_folder_entered_once_through_deep_link_cycles(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    for name in "abc":
        for other in "abc":
            (tmp_path / name / other).symlink_to(tmp_path / other)
    write(tmp_path / "c" / "x.wav", b"x")
    begin = time.perf_counter()
    entries, _ = load_manifest([tmp_path])
    assert len(entries) == 1 and time.perf_counter() - begin < 5


def test_one_audio_file(tmp_path: Path) -> None:
    file = write(tmp_path / "Clip.FLAC", b"whatever it holds, the index will say")
    assert paths_of(file) == [str(file)]


def test_several(tmp_path: Path) -> None:
    one = write(tmp_path / "one/m.csv", "path,label\na.wav,x\n")
    two = write(tmp_path / "two/m.csv", "file_name,speaker\nb.wav,y\n")
    entries, notes = load_manifest([one, str(two)])
    assert entries.root == f"{tmp_path}/"
    assert list(entries.paths) == ["one/a.wav", "two/b.wav"]
    assert entries.labels == {"label": ["x", ""], "speaker": ["", "y"]}
    assert [entries.where(i) for i in range(2)] == [f"{one} line 2", f"{two} line 2"]
    assert notes == []


# ------------------------------------------------------------------------------------------------- duplicates


def test_duplicates_are_taken_once_and_named(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.csv",
        f"path,label\na.wav,x\nb.wav,x\n./a.wav,x\nsub/../b.wav,y\n{tmp_path}//a.wav,x\n",
    )
    other = write(tmp_path / "n.csv", "path\na.wav\nc.wav\n")
    entries, notes = load_manifest([file, other])
    assert list(entries.paths) == ["a.wav", "b.wav", "c.wav"]
    assert entries.labels["label"] == ["x", "x", ""]
    assert len(notes) == 1 and notes[0].count == 4
    assert f"{file} line 4" in notes[0].text and "2 of them carry other labels" in notes[0].text


def test_parent_steps_follow_links_as_the_system_does(tmp_path: Path) -> None:
    """`link/../x` is beside the target of the link, not beside the link."""
    (tmp_path / "far" / "folder").mkdir(parents=True)
    write(tmp_path / "far" / "x.wav", b"right")
    write(tmp_path / "x.wav", b"wrong")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "folder")
    (path,) = paths_of(write(tmp_path / "m.csv", "path\nlink/../x.wav\n"))
    assert Path(path).read_bytes() == b"right"


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", b"", ["empty (0 bytes)"]),
        ("m.csv", b"\n \r\n\t\n", ["empty"]),
        ("m.csv", b'""\n', ["empty"]),
        ("m.csv", b"path,label\n", ["no clips"]),
        ("m.csv", b"paht,label\na.wav,x\n", ["paht, label", "path, file_name", "Did you mean 'path'?"]),
        ("m.csv", b"path;label\na.wav;x\n", ["path;label", "commas or tabs"]),
        ("m.csv", b"x,y\n1,2\n", ["Found (CSV header): x, y"]),
        ("m.csv", b"path,label\na.wav,x\nb.wav\n", ["line 3", "1 cells", "2 (path, label)"]),
        ("m.csv", b"path,label\na, b.wav,x\n", ["line 2", "3 cells", "with a comma need quotes"]),
        ("m.csv", b"path,label,label\na.wav,x,y\n", ["'label'", "twice"]),
        ("m.csv", b"path,label\n,x\n", ["line 2", "path is empty"]),
        ("m.csv", b"path,label\n\xe9t\xe9.wav,x\n", ["line 2", "0xe9", "not UTF-8"]),
        ("m.csv", "path,label\na.wav,x\n".encode("utf-16"), ["UTF-16"]),
        ("m.csv", b'path,label\n"a.wav,x\nb.wav,y\n', ["line 2", "unexpected end of data"]),
        ("m.csv", b'path,label\n"a"b.wav,x\n', ["line 2", "quote"]),
        ("m.csv", b"path,label\ra.wav,x\rb.wav,y\r", ["line 1", "LF or CRLF"]),
        ("m.csv", b"path,label\na\0.wav,x\n", ["binary"]),
        ("m.csv", b"path\n" + b"a.wav\n" * 1000 + b"b\0.wav\n", ["line 1002", "NUL"]),
        ("m.csv", b"path\n" + b"a" * 70000, ["line 2", "longer than"]),
        ("m.csv", b"a.wav,dog\nb.wav,cat\n", ["Found (CSV header): a.wav, dog"]),
        ("m.csv", b"dog,a.wav\ncat,b.wav\n", ["line 1", "without header", "path,label"]),
        ("m.txt", b"a.wav\nb.wav\t3\n", ["line 2", "tab"]),
        ("m.txt", b"a.wav\nb.wav\nc.wav\t3\n", ["line 3", "tab"]),
        ("m.csv", b"path,num_samples\na.wav,-3\n", ["line 2", "num_samples", "'-3'"]),
        ("m.csv", b"path,num_samples\na.wav,1e5\n", ["line 2", "num_samples", "'1e5'"]),
        ("m.csv", b"path,sample_rate_hz\na.wav,16\n", ["line 2", "sample_rate_hz", "1000 to 768000"]),
        ("m.csv", b"path,num_samples\na.wav," + b"9" * 5000 + b"\n", ["line 2", "num_samples"]),
        ("m.tsv", b"/root\na.wav\t100\nb.wav\n", ["line 3", "fairseq"]),
        ("m.tsv", b"/root\na.wav\t100\nb.wav\tx\n", ["line 3", "fairseq"]),
        ("m.json", b'{"data": [', ["line 1 column", "not valid JSON"]),
        ("m.json", b'{"data":\n [{"wav": "a.wav"},\n {"wav" "b.wav"}]}', ["line 3 column 9", "delimiter"]),
        ("m.json", b'{"data": []}', ["no clips"]),
        ("m.json", b'{"clips": [{"wav": "a.wav"}]}', ["an object with clips"]),
        ("m.json", b'[{"wav": "a.wav"}]', ["found list"]),
        ("m.json", b"3", ["found int"]),
        ("m.json", b'{"data": {"wav": "a.wav"}}', ["'data' of type dict"]),
        ("m.json", b'{"data": [{"wav": "a.wav"}, "b.wav"]}', ["entry 2", "found str"]),
        ("m.json", b'{"data": [{"wav": "a.wav"}, {"labels": "x"}]}', ["entry 2", "'wav'"]),
        ("m.json", b'{"data": [{"wav": 3}]}', ["entry 1", "'wav'"]),
        ("m.json", b'{"data": [{"wave": "a.wav"}]}', ["Found (entries): wave", "Did you mean 'wav'?"]),
        ("m.json", b'{"data": [{"wav": "\\ud800.wav"}]}', ["entry 1", "half a character"]),
        ("m.json", b'{"data": [{"wav": "a\\u0000.wav"}]}', ["entry 1", "NUL"]),
        ("m.json", b'{"data": [{"wav": "a.wav", "\\ud800": 1}]}', ["key", "half a character"]),
        ("m.json", b'{"data": [{"wav": "a.wav", "num_samples": 1.5}]}', ["entry 1", "'1.5'"]),
        ("m.json", b'{"data": [{"wav": "a.wav", "num_samples": true}]}', ["entry 1", "'true'"]),
        ("m.json", b'{"data": ' + b"[" * 100000, ["not usable as JSON"]),
        ("m.json", b'{"data": [{"wav": "a.wav", "n": ' + b"9" * 5000 + b"}]}", ["not usable as JSON"]),
        ("m.json", b'{"data": [\n{"wav": "\xff.wav"}]}', ["line 2", "not UTF-8"]),
        ("m.csv", b"RIFF\x24\x00\x00\x00WAVEfmt ", ["holds WAV audio"]),
        ("m.csv", b"fLaC\x00\x00\x00\x22", ["holds FLAC audio"]),
        ("m.csv", b"OggS\x00\x02", ["holds Ogg audio"]),
        ("m.tar", b"a.wav" + bytes(600), ["binary"]),
        ("m.csv", b"\x1f\x8b\x08\x00\x00\x00", ["binary"]),
    ],
)
def test_broken(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        load_manifest([file])
    message = str(caught.value)
    assert message.startswith(str(file))
    for word in words:
        assert word in message, message
    assert len(message) < 700 and message.isprintable()


def test_absent(tmp_path: Path) -> None:
    write(tmp_path / "clips.csv", "path\na.wav\n")
    with pytest.raises(DataError, match=r"clip\.csv: no such file or folder\. Did you mean 'clips\.csv'\?"):
        load_manifest([tmp_path / "clip.csv"])
    with pytest.raises(DataError, match="folder does not exist either"):
        load_manifest([tmp_path / "no" / "clip.csv"])
    with pytest.raises(DataError, match="'~' is not expanded"):
        load_manifest(["~/clips.csv"])
    with pytest.raises(DataError, match="No data was named"):
        load_manifest([])
    for name in ("a\0b", "x" * 5000, "\ud800", ""):
        with pytest.raises(DataError):
            load_manifest([name])


def test_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.csv")
    begin = time.perf_counter()
    for path in (tmp_path / "m.csv", "/dev/zero"):
        with pytest.raises(DataError, match="neither a regular file nor a folder"):
            load_manifest([path])
    assert time.perf_counter() - begin < 2


def test_huge_files_are_refused_at_once(tmp_path: Path) -> None:
    begin = time.perf_counter()
    for name in ("m.csv", "m.json"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(3 * 2**30)
        with pytest.raises(DataError, match=r"3\.0 GiB are too large"):
            load_manifest([tmp_path / name])
    # text without line ends, below the limit: the first line is not read to its end
    with open(tmp_path / "one.csv", "wb") as file:
        file.write(b"x" * 5000)
        file.truncate(2**29)
    with pytest.raises(DataError, match="line 1: longer"):
        load_manifest([tmp_path / "one.csv"])
    assert time.perf_counter() - begin < 2


def test_folders_without_audio(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing at all"):
        load_manifest([tmp_path])
    write(tmp_path / "a.mp4", b"")
    write(tmp_path / "b.mp4", b"")
    write(tmp_path / "README", b"")
    with pytest.raises(DataError, match=r"2 \.mp4, 1 without suffix.*Read are \.wav"):
        load_manifest([tmp_path])


# -------------------------------------------------------------------------------------- the manifest itself


def test_policy() -> None:
    """max(10, 1 %) bad clips are borne."""
    assert [too_many(bad, 5) for bad in (5, 10, 11)] == [False, False, True]
    assert [too_many(bad, 1000) for bad in (10, 11)] == [False, True]
    assert [too_many(bad, 3000) for bad in (30, 31)] == [False, True]
    assert [too_many(bad, 2_000_000) for bad in (20_000, 20_001)] == [False, True]


def test_seconds() -> None:
    clips = manifest("/r", ["a.wav", "b.wav", "c.wav"])
    assert clips.seconds == pytest.approx(6000 / 16000)
    assert clips.durations.tolist() == pytest.approx([1 / 16, 2 / 16, 3 / 16])
    assert clips.path(1) == "/r/b.wav" and clips.where(1) == "x.tsv line 3" and len(clips) == 3


def test_digest_names_a_change() -> None:
    base = manifest("/r", ["x/a.wav", "x/b.wav"], label=["p", "q"], fold=["1", "2"])
    same = [
        manifest("/other/", ["x/a.wav", "x/b.wav"], fold=["1", "2"], label=["p", "q"]),
        manifest("/r/x", ["a.wav", "b.wav"], label=["p", "q"], fold=["1", "2"]),
        manifest("/", ["r/x/a.wav", "r/x/b.wav"], label=["p", "q"], fold=["1", "2"]),
    ]
    other = [
        manifest("/r", ["x/b.wav", "x/a.wav"], label=["p", "q"], fold=["1", "2"]),
        manifest("/r", ["x/a.wav", "x/c.wav"], label=["p", "q"], fold=["1", "2"]),
        manifest("/r", ["x/a.wav", "y/b.wav"], label=["p", "q"], fold=["1", "2"]),
        manifest("/r", ["x/a.wav"], label=["p"], fold=["1"]),
        manifest("/r", ["x/a.wav", "x/b.wav"], label=["p", "r"], fold=["1", "2"]),
        manifest("/r", ["x/a.wav", "x/b.wav"], label=["pq", ""], fold=["1", "2"]),
        manifest("/r", ["x/a.wav", "x/b.wav"], label=["p", "q"]),
    ]
    longer = manifest("/r", ["x/a.wav", "x/b.wav"], label=["p", "q"], fold=["1", "2"])
    longer.num_samples[1] += 1
    assert {clips.digest for clips in same} == {base.digest}
    assert len({clips.digest for clips in [base, longer, *other]}) == 2 + len(other)


@pytest.mark.parametrize("place", ["beside", "above", "below", "elsewhere"])
def test_canonical_round_trip(tmp_path: Path, place: str) -> None:
    names = ["a/x.wav", "a/y\tz.wav", 'a/"q".wav', "a/b/ü\n.wav", "a/ s .wav"]
    clips = manifest(f"{tmp_path}/audio/", names, label=["p", "", "q\r", " r", 's"'], fold=list("12345"))
    folder = {"beside": "audio", "above": ".", "below": "audio/a", "elsewhere": "lists"}[place]
    target = tmp_path / folder / "m.tsv"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_canonical(clips, target)
    entries, notes = load_manifest([target])
    again = Manifest(**entries.columns(np.arange(len(entries))))
    assert notes == []
    assert [again.path(i) for i in range(5)] == [clips.path(i) for i in range(5)]
    assert again.labels == clips.labels and again.digest == clips.digest
    header, first = target.read_text().splitlines()[:2]
    assert header == "path\tnum_samples\tsample_rate_hz\tlabel\tfold"
    relative = {"beside": "a/x.wav", "above": "audio/a/x.wav", "below": "x.wav"}.get(place, clips.path(0))
    assert first == f"{relative}\t1000\t16000\tp\t1"
    assert os.listdir(target.parent).count("m.tsv") == 1
    assert not [name for name in os.listdir(target.parent) if name.endswith(".tmp")]


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    target = write(tmp_path / "m.tsv", "old")
    unwritable = manifest("/r/\udcff", ["a.wav", "b.wav"])
    with pytest.raises(DataError, match="not named in UTF-8"):
        write_canonical(unwritable, target)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["m.tsv"]
    with pytest.raises(DataError, match="cannot be written"):
        write_canonical(manifest("/r", ["a.wav"]), tmp_path / "no" / "m.tsv")
    with pytest.raises(DataError, match="cannot be written"):
        write_canonical(manifest("/r", ["a.wav"]), tmp_path)


def test_large_manifests_are_read_fast(tmp_path: Path) -> None:
    """100 000 rows with lengths take well under the time of opening as many files."""
    rows = "".join(
        f"audio/{i // 1000}/clip_{i}.flac\t{160000 + i}\t16000\tclass_{i % 500}\n" for i in range(100_000)
    )
    file = write(tmp_path / "m.tsv", "path\tnum_samples\tsample_rate_hz\tlabel\n" + rows)
    begin = time.perf_counter()
    entries, _ = load_manifest([file])
    assert time.perf_counter() - begin < 5
    assert len(entries) == 100_000 and entries.num_samples[-1] == 259_999
    # equal labels are one object, not one per clip
    assert len({id(value) for value in entries.labels["label"]}) == 500


# ------------------------------------------------------------------------------------------------- real audio


def test_real_manifests(data_dir: Path) -> None:
    esc10, _ = load_manifest([data_dir / "esc10.csv"])
    fsdd, _ = load_manifest([data_dir / "fsdd.csv"])
    assert (len(esc10), len(fsdd)) == (400, 3000)
    assert set(esc10.labels) == {"label", "fold"} and set(fsdd.labels) == {"digit", "speaker", "split"}
    assert len(set(esc10.labels["label"])) == 10 and set(esc10.labels["fold"]) == set("12345")
    both, notes = load_manifest([data_dir / "esc10.csv", data_dir / "fsdd.csv"])
    assert len(both) == 3400 and notes == []
    folders, _ = load_manifest([data_dir / "esc10", data_dir / "fsdd"])
    assert {folders.path(i) for i in range(3400)} == {both.path(i) for i in range(3400)}


def test_a_folder_of_waves_next_to_its_table(tmp_path: Path) -> None:
    """The table, the list and the folder name the same clips: together they are the clips once."""
    for name in ("a.wav", "b.wav"):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(bytes(1600))
    table = write(tmp_path / "m.csv", "path,label\na.wav,x\nb.wav,y\n")
    listed = write(tmp_path / "m.txt", "a.wav\nb.wav\n")
    entries, notes = load_manifest([table, listed, tmp_path, tmp_path / "a.wav"])
    assert list(entries.paths) == ["a.wav", "b.wav"] and entries.labels == {"label": ["x", "y"]}
    assert notes[0].count == 5
