# SPDX-License-Identifier: Apache-2.0
"""Whatever stands in a manifest, it is read or refused by a DataError; what is written is read back equal."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.data.manifest import NUM_SAMPLES, SAMPLE_RATE, Entries, Manifest, Source, write_canonical
from masktrain.data.readers import PATH_COLUMNS, load_manifest
from masktrain.errors import DataError

SUFFIXES = st.sampled_from([".csv", ".tsv", ".json", ".txt", ""])
# what makes trouble in tables: separators, quotes, line ends, marks, wide and composed characters
CELL = st.text(
    st.one_of(
        st.sampled_from(list(",;\t\"'\n\r \\~.ab1\ufeff\x85\u2028\x1c")),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=12,
)
NAME = CELL.map(lambda text: text.replace("/", "")).filter(lambda text: text not in ("", ".", ".."))
PATH = st.lists(NAME, min_size=1, max_size=3).map("/".join).filter(lambda text: text.strip())
COLUMN = CELL.map(str.strip).filter(
    lambda text: text and text.lower() not in PATH_COLUMNS and text not in (NUM_SAMPLES, SAMPLE_RATE)
)

FRAGMENTS = st.lists(
    st.one_of(
        st.sampled_from(
            [b"path", b"file_name", b"wav", b",", b"\t", b"\n", b"\r\n", b'"', b".wav", b"num_samples"]
        ),
        st.sampled_from(
            [b"sample_rate_hz", b"16000", b'{"data": [', b'{"wav": "a.wav"}', b"]}", b":", b"{", b"["]
        ),
        st.sampled_from(
            [b"\xef\xbb\xbf", b"\xff", b"\0", b"/", b"..", b"~", b"-1", b"9" * 30, b" ", b"\r", b"null"]
        ),
        st.binary(max_size=4),
    ),
    max_size=30,
).map(b"".join)

JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(st.characters(), max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["wav", "path", "data", "labels", "num_samples", "", " wav"]), inner
        )
    ),
    max_leaves=12,
)

Read = Callable[[bytes, str], Entries | None]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Read bytes as a manifest: the entries if it is one, None if it is refused as it should be."""
    folder = tmp_path_factory.mktemp("manifest")

    def reader(content: bytes, suffix: str) -> Entries | None:
        file = folder / f"m{suffix}"
        file.write_bytes(content)
        try:
            entries, _ = load_manifest([file])
        except DataError as error:
            assert str(error).startswith(str(file)) and len(str(error)) < 3000 and str(error).isprintable()
            return None
        check(entries)
        return entries

    return reader


def check(entries: Entries) -> None:
    """Check what every later stage relies on."""
    count = len(entries)
    assert count > 0 and len(set(entries.paths)) == count
    assert entries.num_samples.shape == entries.sample_rate.shape == entries.rows.shape == (count,)
    assert all(len(values) == count for values in entries.labels.values())
    assert (entries.num_samples >= -1).all() and (entries.sample_rate >= -1).all()
    for i in range(count):
        path = entries.path(i)
        assert path.startswith("/") and "\0" not in path
        path.encode()  # a name in UTF-8
        assert entries.where(i).isprintable()


@settings(max_examples=300, deadline=None)
@given(content=FRAGMENTS, suffix=SUFFIXES)
def test_junk(read: Read, content: bytes, suffix: str) -> None:
    read(content, suffix)


@settings(max_examples=200, deadline=None)
@given(document=JSON, wrapped=st.booleans())
def test_any_json(read: Read, document: Any, wrapped: bool) -> None:
    read(json.dumps({"data": [document]} if wrapped else document).encode(), ".json")


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["csv", "tsv", "fairseq", "json", "list"]))
def test_a_valid_manifest_damaged_anywhere(read: Read, data: st.DataObject, kind: str) -> None:
    whole = {
        "csv": b"path,label\r\na/b.wav,x\r\n" + "ü.wav,y\r\n".encode(),
        "tsv": b"path\tnum_samples\tsample_rate_hz\tlabel\na.wav\t100\t8000\tx\n",
        "fairseq": b"/data\na.wav\t100\nb.wav\t200\n",
        "json": b'{"data": [{"wav": "a.wav", "labels": "x"}, {"wav": "b.wav", "labels": ["y"]}]}',
        "list": b"a.wav\nb/c.flac\n",
    }[kind]
    suffix = ".json" if kind == "json" else ".tsv"
    assert read(whole, suffix) is not None
    begin = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(begin, min(len(whole), begin + 8)))
    read(whole[:begin] + data.draw(st.binary(max_size=6)) + whole[end:], suffix)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    delimiter=st.sampled_from([",", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_tables_as_spreadsheets_write_them(
    read: Read, data: st.DataObject, delimiter: str, end: str, bom: bool
) -> None:
    """Any columns in any order, every cell quoted: paths and labels come out as they went in."""
    columns = data.draw(st.lists(COLUMN, unique=True, max_size=3))
    place = data.draw(st.integers(0, len(columns)))
    header = [*columns[:place], data.draw(st.sampled_from(PATH_COLUMNS)), *columns[place:]]
    paths = data.draw(st.lists(PATH, min_size=1, max_size=5, unique=True))
    rows = [[*(data.draw(CELL) for _ in columns)] for _ in paths]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(header)
    for path, row in zip(paths, rows, strict=True):
        writer.writerow([*row[:place], path, *row[place:]])
    entries = read((b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode(), ".csv")
    assert entries is not None
    assert [
        os.path.relpath(entries.path(i), entries.sources[0].name + "/..") for i in range(len(paths))
    ] == paths
    assert entries.labels == {column: [row[i] for row in rows] for i, column in enumerate(columns)}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), inside=st.booleans())
def test_canonical_round_trip(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, inside: bool
) -> None:
    paths = data.draw(st.lists(PATH, min_size=1, max_size=6, unique=True))
    columns = data.draw(st.lists(COLUMN, unique=True, max_size=3))
    count = len(paths)
    folder = tmp_path_factory.getbasetemp() / "round_trip"
    folder.mkdir(exist_ok=True)
    clips = Manifest(
        root=str(folder) if inside else "/some/where else",
        paths=paths,
        num_samples=np.array(data.draw(st.lists(st.integers(1, 10**18 - 1), min_size=count, max_size=count))),
        sample_rate=np.array(
            data.draw(st.lists(st.integers(1000, 768_000), min_size=count, max_size=count)), dtype=np.int32
        ),
        labels={column: [data.draw(CELL) for _ in paths] for column in columns},
        sources=[Source("m", "line")],
        source=np.zeros(count, dtype=np.int32),
        rows=np.arange(count),
    )
    target = folder / "m.tsv"
    write_canonical(clips, target)
    entries, notes = load_manifest([target])
    check(entries)
    again = Manifest(**entries.columns(np.arange(count)))
    assert notes == []
    assert [again.path(i) for i in range(count)] == [clips.path(i) for i in range(count)]
    assert np.array_equal(again.num_samples, clips.num_samples)
    assert np.array_equal(again.sample_rate, clips.sample_rate)
    assert again.labels == clips.labels
    assert again.digest == clips.digest


@settings(max_examples=60, deadline=None)
@given(names=st.lists(PATH.filter(lambda p: all(len(n.encode()) < 200 for n in p.split("/"))), max_size=6))
def test_folders_of_any_names(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """What is found is what was put there: visible names below visible folders."""
    folder = tmp_path_factory.mktemp("folder")
    expected = set()
    for name in names:
        file = folder / f"{name}.wav"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(exist_ok=True)
        except (FileExistsError, NotADirectoryError):  # one name is a folder of another
            continue
        if not any(part.startswith(".") for part in f"{name}.wav".split("/")):
            expected.add(str(file))
    if not expected:
        with pytest.raises(DataError, match="no audio file"):
            load_manifest([folder])
        return
    entries, notes = load_manifest([folder, folder])
    check(entries)
    assert {entries.path(i) for i in range(len(entries))} == expected
    assert [note.count for note in notes] == [len(expected)]


def test_the_reader_needs_no_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest's own name counts from the working folder, the paths in it from the manifest's folder."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "m.csv").write_text("path\na.wav\n")
    monkeypatch.chdir(tmp_path)
    entries, _ = load_manifest(["sub/m.csv"])
    assert entries.path(0) == str(tmp_path / "sub" / "a.wav")
