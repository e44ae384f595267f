# SPDX-License-Identifier: Apache-2.0
"""Reads whatever names the user's clips, and says what is wrong with it.

| what | recognised by | paths count from |
| --- | --- | --- |
| folder | being one; read recursively by name, hidden entries are not entered | the folder |
| audio file | its suffix | |
| CSV, TSV | a header with a path column (`PATH_COLUMNS`); the rest are labels | the manifest's folder |
| canonical TSV | as above, with `num_samples` and `sample_rate_hz` | the manifest's folder |
| AST-style JSON | `{"data": [{"wav": ..., "labels": ...}, ...]}` | the manifest's folder |
| fairseq TSV | a line with the root folder, then `path<TAB>samples` | that root |
| list | one path a line, the first with an audio suffix and no comma | the manifest's folder |

Only regular files of a bounded size are opened, lines are bounded as well, and every fault is a DataError.
"""

from __future__ import annotations

import csv
import errno
import itertools
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from masktrain.data.manifest import (
    MAX_RATE,
    MIN_RATE,
    NUM_SAMPLES,
    SAMPLE_RATE,
    UNKNOWN,
    Entries,
    Note,
    Source,
    common_folder,
    shown,
)
from masktrain.errors import DataError, nearest

AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif"),
    *(".au", ".caf", ".w64", ".rf64"),
)
PATH_COLUMNS = ("path", "file_name", "filename", "file", "wav")
"""Names of the path column, in any case; the first of them that a manifest has is taken."""

REPEATED = "entries name a file once more"
"""Words of the note on files that are named twice."""

_UNREAD_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".webm", ".mka", ".amr")
_MAX_BYTES = 2**30
_MAX_LINE = 2**16
_HEAD = 4096
_CHUNK = 4096
_MAGIC = {
    b"RIFF": "WAV",
    b"RF64": "WAV",
    b"riff": "Wave64",
    b"FORM": "AIFF",
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3": "MP3",
    b"caff": "CAF",
    b".snd": "AU",
}
_FORMATS = (
    "a folder, an audio file, CSV or TSV with a header, JSON {'data': [...]}, fairseq TSV, or a list of paths"
)


@dataclass
class _Rows:
    """What one manifest holds. paths: as written, counted from `folder`; where: line or entry of each."""

    source: Source
    folder: str
    paths: list[str]
    where: Sequence[int]
    num_samples: list[int] = field(default_factory=list)
    sample_rate: list[int] = field(default_factory=list)
    labels: dict[str, list[str]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_samples = self.num_samples or [UNKNOWN] * len(self.paths)
        self.sample_rate = self.sample_rate or [UNKNOWN] * len(self.paths)


def load_manifest(paths: Sequence[str | os.PathLike[str]]) -> tuple[Entries, list[Note]]:
    """Read manifests, folders and audio files one after the other into one table of clips.

    A file that is named twice is taken once, with a note. The audio files themselves are not looked at:
    `index.index_manifest` does that. Raises DataError if a manifest is absent, of no known form, or broken.
    """
    if not paths:
        raise DataError(f"No data was named. Allowed: {_FORMATS}.")
    return _merge([_read(os.fspath(path)) for path in paths])


def _merge(parts: list[_Rows]) -> tuple[Entries, list[Note]]:
    columns = list(dict.fromkeys(name for part in parts for name in part.labels))
    notes = [note for part in parts for note in part.notes]
    absolute = [path for part in parts for path in _absolute(part.folder, part.paths)]
    labels = {
        name: [v for part in parts for v in part.labels.get(name, [""] * len(part.paths))] for name in columns
    }
    entries = Entries(
        root="/",
        paths=absolute,
        num_samples=np.array([n for part in parts for n in part.num_samples], dtype=np.int64),
        sample_rate=np.array([n for part in parts for n in part.sample_rate], dtype=np.int32),
        labels=labels,
        sources=[part.source for part in parts],
        source=np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.paths) for part in parts]),
        rows=np.concatenate([np.asarray(part.where, dtype=np.int64) for part in parts]),
    )
    first: dict[str, int] = {}
    for index, path in enumerate(absolute):
        first.setdefault(path, index)
    if len(first) < len(absolute):
        notes.append(_duplicates(entries, first))
    kept = entries.columns(np.fromiter(first.values(), dtype=np.int64, count=len(first)))
    root = common_folder(kept["paths"])
    return Entries(**kept | {"root": root, "paths": [path[len(root) :] for path in kept["paths"]]}), notes


def _duplicates(entries: Entries, first: dict[str, int]) -> Note:
    again = [i for i, path in enumerate(entries.paths) if first[path] != i]
    differing = sum(
        any(values[i] != values[first[entries.paths[i]]] for values in entries.labels.values()) for i in again
    )
    named = "; ".join(entries.named(i) for i in again[:3])
    text = f"{len(again)} {REPEATED}; each file is taken once. The first: {named}."
    if differing:
        text += (
            f" {differing} of them carry other labels than the first entry of the file; those are not used."
        )
    return Note(text, len(again))


def _absolute(folder: str, paths: list[str]) -> Iterator[str]:
    """Yield absolute paths in one spelling each, so that equal files are seen to be equal."""
    targets: dict[str, str] = {}
    prefix = _normal(folder, targets).rstrip("/") + "/"
    for path in paths:
        full = path if path.startswith("/") else prefix + path
        yield _normal(full, targets) if path.startswith(".") or "/." in path or "//" in path else full


def _normal(path: str, targets: dict[str, str]) -> str:
    """Return an absolute path without `.`, `..` and double slashes. targets: folders already looked up."""
    head, tail = os.path.split(path)
    if tail == ".." or ".." in head.split("/"):
        # a parent step is taken from the folder that a symbolic link leads to, as the system does
        if head not in targets:
            targets[head] = os.path.realpath(head)
        path = os.path.join(targets[head], tail)
    return "/" + os.path.normpath(path).lstrip("/")


def _read(path: str) -> _Rows:
    """Read one manifest, folder or audio file."""
    name = shown(path)
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise _absent(path, error) from error
    if stat.S_ISDIR(status.st_mode):
        return _read_folder(path)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{name}: neither a regular file nor a folder. Allowed: {_FORMATS}.")
    if path.lower().endswith(AUDIO_SUFFIXES):
        if not _is_utf8(path):
            raise DataError(f"{name}: the name of the file is not UTF-8; rename it.")
        folder, file = os.path.split(os.path.abspath(path))
        return _Rows(Source(path, ""), folder, [file], [0])
    if status.st_size == 0:
        raise DataError(f"{name}: the manifest is empty (0 bytes).")
    if status.st_size > _MAX_BYTES:
        raise DataError(
            f"{name}: {status.st_size / 2**30:.1f} GiB are too large for a manifest; at most "
            f"{_MAX_BYTES / 2**30:.0f} GiB. Name the manifest of the audio, or the folder that holds it."
        )
    try:
        with open(path, "rb") as file_object:
            head = file_object.read(_HEAD)
            file_object.seek(0)
            _check_text(name, head)
            if path.lower().endswith(".json") or head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return _read_json(path, file_object)
            return _read_text(path, file_object)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}.") from error


def _absent(path: str, error: OSError | ValueError) -> DataError:
    """Return the error for a path that cannot be opened, with the nearest name of its folder."""
    name = shown(path)
    if not isinstance(error, OSError):
        return DataError(f"{path!a}: not a file name: {error}.")
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        return DataError(f"{name}: cannot be read: {error.strerror}.")
    hint = " '~' is not expanded here: write the folder in full." if path.startswith("~") else ""
    if not hint:
        try:
            with os.scandir(os.path.dirname(path) or ".") as listing:
                names = [entry.name for entry in itertools.islice(listing, 1000)]
            hint = nearest(os.path.basename(path), filter(str.isprintable, names))
        except OSError:
            hint = " Its folder does not exist either."
    return DataError(f"{name}: no such file or folder.{hint} Allowed: {_FORMATS}.")


def _check_text(name: str, head: bytes) -> None:
    """Refuse audio, UTF-16 and other binary data by the first bytes."""
    for magic, kind in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"{name}: holds {kind} audio, not a manifest. Give an audio file its own suffix "
                f"({', '.join(AUDIO_SUFFIXES)}) or name the folder that holds it."
            )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: encoded in UTF-16; save the manifest as UTF-8.")
    if b"\0" in head:
        raise DataError(f"{name}: holds binary data, not a manifest. Allowed: {_FORMATS}.")


# ---------------------------------------------------------------------------------------------------- folders


def _read_folder(path: str) -> _Rows:
    """List the audio files of a folder and below. Each folder is entered once, whatever links lead to it."""
    root = os.path.abspath(path)
    found: list[str] = []
    skipped: dict[str, list[str]] = {"unread": [], "name": [], "folder": []}
    suffixes: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    stack = [""]
    while stack:
        prefix = stack.pop()
        try:
            status = os.stat(os.path.join(root, prefix))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(os.path.join(root, prefix)) as listing:
                children = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            if not prefix:
                raise DataError(f"{shown(path)}: the folder cannot be read: {error.strerror}.") from error
            skipped["folder"].append(f"{shown(prefix)} ({error.strerror})")
            continue
        folders = []
        for child in children:
            if child.name.startswith("."):
                continue
            if _is_folder(child):
                folders.append(f"{prefix}{child.name}/")
                continue
            suffix = os.path.splitext(child.name)[1].lower()
            suffixes[suffix] += 1
            if suffix in _UNREAD_SUFFIXES:
                skipped["unread"].append(shown(prefix + child.name))
            elif suffix in AUDIO_SUFFIXES:
                if _is_utf8(prefix + child.name):
                    found.append(prefix + child.name)
                else:
                    skipped["name"].append(shown(prefix + child.name))
        stack.extend(reversed(folders))
    if not found:
        held = ", ".join(f"{n} {shown(s) or 'without suffix'}" for s, n in suffixes.most_common(4))
        raise DataError(
            f"{shown(path)}: the folder holds no audio file ({held or 'nothing at all'}). "
            f"Read are {', '.join(AUDIO_SUFFIXES)}."
        )
    rows = _Rows(Source(path, ""), root, found, [0] * len(found))
    reasons = {
        "unread": f"files are left out ({', '.join(_UNREAD_SUFFIXES)} are not decoded here); convert them",
        "name": "files are left out, since their names are not UTF-8; rename them",
        "folder": "folders are left out, since they cannot be read",
    }
    for kind, names in skipped.items():
        if names:
            text = f"{shown(path)}: {len(names)} {reasons[kind]}. The first: {', '.join(names[:3])}."
            rows.notes.append(Note(text, len(names)))
    return rows


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------- text


def _lines(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, without a byte order mark."""
    number = 0
    while raw := file.readline(_MAX_LINE + 1):
        number += 1
        if len(raw) > _MAX_LINE:
            raise DataError(f"{name} line {number}: longer than {_MAX_LINE} bytes: not a manifest.")
        if b"\0" in raw:
            raise DataError(f"{name} line {number}: holds a NUL byte: not a text file.")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name} line {number}: byte {raw[error.start]:#04x} (column {error.start + 1}) is not"
                " UTF-8; save the manifest as UTF-8."
            ) from error
        yield line.removeprefix("\ufeff") if number == 1 else line


def _read_text(path: str, file: BinaryIO) -> _Rows:
    """Tell CSV, TSV, fairseq TSV and lists of paths apart by the first two lines that are not empty."""
    name = shown(path)
    numbered = enumerate(_lines(file, name), 1)
    head = list(itertools.islice(((n, line) for n, line in numbered if line.strip()), 2))
    if not head:
        raise DataError(f"{name}: the manifest is empty: it has no line with text.")
    first = head[0][1].rstrip("\r\n")
    second = head[1][1].rstrip("\r\n").split("\t") if len(head) == 2 else []
    folder = os.path.dirname(os.path.abspath(path))
    rest = itertools.chain(head, ((n, line) for n, line in numbered if line.strip()))
    headless = "\t" not in first and first.strip().lower() not in PATH_COLUMNS and not first.startswith('"')
    audio = first.rstrip().lower().endswith(AUDIO_SUFFIXES)
    counted = len(second) == 2 and _is_count(second[1])
    if headless and counted and (not audio or os.path.isdir(os.path.join(folder, first.strip()))):
        return _read_fairseq(path, folder, rest)
    if headless and audio:
        if "," in first:
            raise DataError(
                f"{name} line {head[0][0]}: {first[:80]!a} may be a path or a row of a CSV without header; "
                f"add a header line, for example '{PATH_COLUMNS[0]}' or '{PATH_COLUMNS[0]},label'."
            )
        return _read_list(path, folder, rest)
    file.seek(0)
    unquoted = "".join(file.read(_HEAD).decode("utf-8", "replace").split('"')[::2]).lstrip("\ufeff\r\n ")
    delimiter = "\t" if "\t" in unquoted.partition("\n")[0] else ","
    file.seek(0)
    return _read_table(path, folder, _lines(file, name), delimiter)


def _is_count(text: str) -> bool:
    """Say whether a cell is a whole number that fits 63 bits."""
    return text.isascii() and text.isdigit() and len(text) <= 18


def _read_fairseq(path: str, folder: str, lines: Iterator[tuple[int, str]]) -> _Rows:
    name = shown(path)
    root = next(lines)[1].strip()
    paths, where, samples = [], [], []
    for number, line in lines:
        cells = line.rstrip("\r\n").split("\t")
        if len(cells) != 2 or not cells[0] or not _is_count(cells[1]):
            raise DataError(
                f"{name} line {number}: expected 'path<TAB>samples' (fairseq TSV), received "
                f"{line.rstrip()[:80]!a}."
            )
        paths.append(cells[0])
        where.append(number)
        samples.append(int(cells[1]))
    return _Rows(Source(path, "line"), os.path.join(folder, root), paths, where, num_samples=samples)


def _read_list(path: str, folder: str, lines: Iterator[tuple[int, str]]) -> _Rows:
    paths, where = [], []
    for number, line in lines:
        if "\t" in line:
            raise DataError(
                f"{shown(path)} line {number}: holds a tab; a list has one path a line, a TSV needs a header "
                f"line with one of the columns {', '.join(PATH_COLUMNS)}."
            )
        paths.append(line.rstrip("\r\n"))
        where.append(number)
    return _Rows(Source(path, "line"), folder, paths, where)


def _read_table(path: str, folder: str, lines: Iterator[str], delimiter: str) -> _Rows:
    """Read CSV or TSV with a header."""
    name = shown(path)
    rows = _table_rows(name, lines, delimiter)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{name}: the manifest is empty: it has no cell with text.")
    header = _column_names(name, first[1])
    path_column = _path_column(name, header, delimiter)
    columns: dict[str, list[str]] = {column: [] for column in header}
    where: list[int] = []
    pool: dict[str, str] = {}
    while chunk := list(itertools.islice(rows, _CHUNK)):
        where.extend(line for line, _ in chunk)
        for column, cells in zip(header, zip(*(row for _, row in chunk), strict=True), strict=True):
            # equal labels are kept once: a label of two million clips is a small number of strings
            columns[column].extend(cells if column == path_column else map(pool.setdefault, cells, cells))
    if not where:
        raise DataError(f"{name}: the manifest has a header but no clips.")
    return _rows_of(Source(path, "line"), folder, columns, path_column, where)


def _table_rows(name: str, lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line and the cells of each row that is not blank, all with as many cells as the first."""
    separator = "tab" if delimiter == "\t" else "comma"
    reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=delimiter == ",")
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if row and (len(row) > 1 or row[0].strip()):
                header = header or row
                if len(row) != len(header):
                    raise DataError(
                        f"{name} line {line}: {len(row)} cells, but the header has {len(header)} "
                        f"({', '.join(shown(c[:60]) for c in header[:9])}). Cells with a {separator} "
                        "need quotes."
                    )
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{name} line {line}: {str(error).replace(delimiter, separator)}. Quotes inside a quoted cell "
            "are doubled; lines end in LF or CRLF."
        ) from error


def _column_names(name: str, names: Iterable[str]) -> list[str]:
    """Strip column names, name the unnamed by their number, refuse doubles."""
    header = [column.strip() or f"column_{number}" for number, column in enumerate(names, 1)]
    doubles = [column for column, count in Counter(header).items() if count > 1]
    if doubles:
        raise DataError(f"{name}: the column {shown(doubles[0])!r} occurs twice.")
    return header


def _path_column(name: str, header: Sequence[str], delimiter: str) -> str:
    lower = [column.lower() for column in header]
    for wanted in PATH_COLUMNS:
        if wanted in lower:
            return header[lower.index(wanted)]
    hint = next((nearest(column, PATH_COLUMNS) for column in lower if nearest(column, PATH_COLUMNS)), "")
    if len(header) == 1 and any(mark in header[0] for mark in ";|"):
        hint = " Columns must be separated by commas or tabs."
    found = ", ".join(shown(column[:60]) for column in header[:12])
    kind = {",": "CSV header", "\t": "TSV header"}.get(delimiter, "entries")
    raise DataError(
        f"{name}: no column with the paths of the clips. Found ({kind}): {found}. "
        f"One of these is needed: {', '.join(PATH_COLUMNS)}.{hint}"
    )


def _rows_of(
    source: Source, folder: str, cells: dict[str, list[str]], path_column: str, where: Sequence[int]
) -> _Rows:
    """Split the columns of a table into paths, lengths, rates and labels."""
    paths = cells.pop(path_column)
    if "" in paths:
        raise DataError(f"{source.where(where[paths.index('')])}: the path is empty.")
    samples = _counts(source, where, NUM_SAMPLES, cells.pop(NUM_SAMPLES, None), 0, 10**18)
    rates = _counts(source, where, SAMPLE_RATE, cells.pop(SAMPLE_RATE, None), MIN_RATE, MAX_RATE)
    return _Rows(source, folder, paths, where, samples, rates, cells)


def _counts(
    source: Source, where: Sequence[int], column: str, cells: list[str] | None, least: int, most: int
) -> list[int]:
    """Return whole numbers from cells; an empty cell is UNKNOWN. [] if there is no such column."""
    values = []
    for row, cell in enumerate(cells or ()):
        if not cell:
            values.append(UNKNOWN)
        elif _is_count(cell) and least <= int(cell) <= most:
            values.append(int(cell))
        else:
            raise DataError(
                f"{source.where(where[row])}: {column} must be a whole number from {least} to {most}, or "
                f"empty; received {cell[:60]!a}."
            )
    return values


# ------------------------------------------------------------------------------------------------------- JSON


def _read_json(path: str, file: BinaryIO) -> _Rows:
    """Read {"data": [{"wav": path, ...}, ...]}; the other fields of an entry are its labels."""
    name = shown(path)
    raw = file.read(_MAX_BYTES)
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name} line {line}: not UTF-8; save the manifest as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name} line {error.lineno} column {error.colno}: not valid JSON: {error.msg}."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: not usable as JSON: {error}.") from error
    data = document.get("data") if isinstance(document, dict) else None
    if not isinstance(data, list):
        if not isinstance(document, dict):
            found = type(document).__name__
        elif "data" in document:
            found = f"'data' of type {type(data).__name__}"
        else:
            found = f"an object with {', '.join(shown(key[:60]) for key in list(document)[:8]) or 'no keys'}"
        raise DataError(
            f"{name}: expected the object {{'data': [{{'wav': path, 'labels': ...}}, ...]}}, found {found}."
        )
    if not data:
        raise DataError(f"{name}: the list 'data' has no clips.")
    source = Source(path, "entry")
    for number, item in enumerate(data, 1):
        if not isinstance(item, dict):
            raise DataError(f"{source.where(number)}: expected an object, found {type(item).__name__}.")
    keys = list(dict.fromkeys(key for item in data for key in item))
    for key in keys:
        if "\0" in key or not _is_utf8(key):
            raise DataError(f"{name}: the key {key[:60]!a} holds a NUL or half a character.")
    header = _column_names(name, keys)
    path_column = _path_column(name, header, "")
    pool: dict[str, str] = {}
    cells = {}
    for column, key in zip(header, keys, strict=True):
        values = [_json_cell(source, number, column, item.get(key)) for number, item in enumerate(data, 1)]
        cells[column] = values if column == path_column else list(map(pool.setdefault, values, values))
    for number, item in enumerate(data, 1):
        if not isinstance(item.get(keys[header.index(path_column)]), str):
            raise DataError(f"{source.where(number)}: '{path_column}' must be a path in quotes.")
    return _rows_of(
        source, os.path.dirname(os.path.abspath(path)), cells, path_column, range(1, len(data) + 1)
    )


def _json_cell(source: Source, number: int, column: str, value: Any) -> str:
    """Return a JSON value as the text of a cell: strings as they are, lists joined by commas."""
    if isinstance(value, str):
        text = value
    elif value is None:
        text = ""
    elif isinstance(value, list) and all(isinstance(v, str) for v in value):
        text = ",".join(value)
    else:
        text = json.dumps(value, ensure_ascii=False)
    if "\0" in text or not _is_utf8(text):
        raise DataError(f"{source.where(number)}: {column} holds a NUL or half a character: {text[:60]!a}.")
    return text
