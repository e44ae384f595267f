# SPDX-License-Identifier: Apache-2.0
"""From a file to mono float32: headers, crops, the one downmix, and what makes a clip bad.

libsndfile, through soundfile, decodes. Files are opened here and handed over as descriptors, so that their
content decides what they are, not their name, and a pipe or a folder cannot block a worker. What libsndfile
lets pass is checked on the bytes themselves: it shortens a truncated WAV in silence, and an Ogg file whose
end is missing likewise.

Seeking is exact in PCM-like WAV and in FLAC only. In Ogg libsndfile lands some hundred samples off near a
file's end. Every other file is decoded from its beginning in blocks up to the end of the crop: slow in long
files, but exact and in bounded memory.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from masktrain.errors import DataError

Kind = Literal["WAV", "FLAC", "VORBIS", "OTHER"]
Audio = NDArray[np.float32]

SEEKABLE_WAV = frozenset(
    ("PCM_U8", "PCM_S8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"),
)
"""Encodings whose samples all take the same number of bytes."""
MAX_RATE_WITHOUT_NOTE = 48_000
FULL_SCALE = 32767 / 32768
"""The largest 16-bit sample."""
CLIPPED_SHARE = 1e-3
LENGTH_TOLERANCE = 0.01
"""A decoded length may differ from the announced one by this share."""

_BLOCK = 1 << 16
# WAV writers that cannot seek back, into a pipe say, leave one of these where the length of the data belongs.
_UNKNOWN_SIZE = 0x7FFFF000
_OGG_PAGE = 65307
_MOST_CHUNKS = 1000
_NAMED: dict[str, tuple[str, ...]] = {
    ".wav": ("WAV", "WAVEX", "RF64"),
    ".flac": ("FLAC", "OGG"),
    ".ogg": ("OGG",),
    ".oga": ("OGG", "FLAC"),
    ".opus": ("OGG",),
    ".mp3": ("MP3", "MPEG"),
}


@dataclass(frozen=True)
class AudioInfo:
    """What the header of a file says. num_samples: frames, samples of one channel. sample_rate: Hz.
    format, subtype: libsndfile's names, such as "WAV" and "PCM_16"."""

    num_samples: int
    sample_rate: int
    channels: int
    format: str
    subtype: str


@dataclass(frozen=True)
class Crop:
    """A stretch of a file, and what the manifest says of the file.

    start, length: in source samples, inside [0, num_samples]. min_samples: shortest crop that the front end
    takes.
    """

    path: str
    start: int
    length: int
    num_samples: int
    sample_rate: int
    min_samples: int = 1


@dataclass(frozen=True)
class Decoded:
    """Mono samples in source order, (n,) float32, and what there is to note about them: a subset of NOTES."""

    samples: Audio
    notes: tuple[str, ...] = ()


SILENT = "silent (every sample of the crop is 0)"
STEREO = "more than one channel (the mean of the channels is taken)"
HIGH_RATE = f"over {MAX_RATE_WITHOUT_NOTE} Hz"
CLIPPED = f"clipped (at least {CLIPPED_SHARE:.1%} of the crop at full scale)"
SHORTER = "up to 1 % shorter than announced"
MISNAMED = "of another format than its name says (the content counts)"
NOTES = (SILENT, STEREO, HIGH_RATE, CLIPPED, SHORTER, MISNAMED)


def probe(path: str | os.PathLike[str]) -> AudioInfo:
    """Read the header of an audio file.

    Raises DataError if the file is missing, unreadable, not audio, holds no samples, or is visibly truncated.
    The message is the reason alone: callers name the file, and often the manifest's line with it.
    """
    with opened(path) as fd:
        inspect(fd)
        with _decoder(fd) as file:
            info = AudioInfo(file.frames, file.samplerate, file.channels, file.format, file.subtype)
    _check_header(info)
    return info


def read_crop(crop: Crop, cancelled: Callable[[], bool] = lambda: False) -> Decoded:
    """Decode a crop to mono.

    cancelled: asked between blocks; once true, decoding ends with CancelledError.

    Raises:
        DataError: the clip is bad; the message is the reason alone.
    """
    try:
        with opened(crop.path) as fd:
            inspect(fd)
            with _decoder(fd) as file:
                info = AudioInfo(file.frames, file.samplerate, file.channels, file.format, file.subtype)
                _check_header(info)
                check_length(crop, info.num_samples, info.sample_rate)
                _skip_to(file, crop.start, cancelled)
                raw = _read(file, crop.length, cancelled)
    except soundfile.LibsndfileError as error:
        raise DataError(f"cannot be decoded: {_text(error)}") from error
    except MemoryError as error:
        raise DataError(f"{crop.length} samples do not fit into memory; lower data.clip_seconds") from error
    return finish(crop, raw, misnamed(crop.path, info.format))


Result = Decoded | DataError


def try_crop(crop: Crop, cancelled: Callable[[], bool] = lambda: False) -> Result:
    """Return `read_crop`'s samples, or the error for which the clip is bad."""
    if crop.num_samples < crop.min_samples:
        return DataError(too_short(crop.num_samples, crop.min_samples))
    try:
        return read_crop(crop, cancelled)
    except DataError as error:
        return error


def finish(crop: Crop, raw: Audio, name_differs: bool) -> Decoded:
    """Check and downmix a decoded crop; what every loader does last.

    raw: (n, channels) float32. Raises DataError if the clip is bad.
    """
    missing = crop.length - len(raw)
    if missing > LENGTH_TOLERANCE * crop.num_samples:
        raise DataError(f"ends {missing} samples before the {crop.num_samples} that were announced")
    if len(raw) < crop.min_samples:
        raise DataError(too_short(len(raw), crop.min_samples))
    notes = list(check(raw))
    if crop.sample_rate > MAX_RATE_WITHOUT_NOTE:
        notes.append(HIGH_RATE)
    if missing:
        notes.append(SHORTER)
    if name_differs:
        notes.append(MISNAMED)
    return Decoded(downmix(raw), tuple(notes))


def too_short(samples: int, least: int) -> str:
    """Return the reason for which a clip of `samples` samples is bad."""
    return f"too short: {samples} samples, and the shortest input is {least}"


def check(raw: Audio) -> tuple[str, ...]:
    """Return what is to be noted of (n, channels) samples, n >= 1; raise DataError if any is NaN or
    infinite."""
    highest, lowest = float(raw.max()), float(raw.min())
    peak = max(highest, -lowest)
    if not np.isfinite(peak) or not np.isfinite(lowest):
        raise DataError("holds NaN or infinite samples")
    notes = []
    if peak == 0:
        notes.append(SILENT)
    if raw.shape[1] > 1:
        notes.append(STEREO)
    if peak >= FULL_SCALE and np.count_nonzero(np.abs(raw) >= FULL_SCALE) >= CLIPPED_SHARE * raw.size:
        notes.append(CLIPPED)
    return tuple(notes)


def downmix(raw: Audio) -> Audio:
    """Return the mean of the channels: (n, channels) -> (n,) float32, contiguous.

    The channels are added in their order in float32, and the sum is divided by their number: the definition,
    the same bits wherever it is computed.
    """
    if raw.shape[1] == 1:
        return np.ascontiguousarray(raw[:, 0])
    total = raw[:, 0].copy()
    for channel in range(1, raw.shape[1]):
        total += raw[:, channel]
    total /= np.float32(raw.shape[1])
    return total


def check_length(crop: Crop, num_samples: int, sample_rate: int) -> None:
    """Raise DataError if a file differs from what its manifest says in rate, or in length by over 1 %."""
    if sample_rate != crop.sample_rate:
        raise DataError(f"has a sample rate of {sample_rate} Hz, and the manifest says {crop.sample_rate} Hz")
    if abs(num_samples - crop.num_samples) > LENGTH_TOLERANCE * crop.num_samples:
        raise DataError(f"holds {num_samples} samples, and the manifest says {crop.num_samples}")


def misnamed(path: str, format: str) -> bool:
    """Say whether the suffix of `path` promises another container than libsndfile's `format`."""
    promised = _NAMED.get(os.path.splitext(path)[1].lower())
    return promised is not None and format not in promised


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[int]:
    """Open a regular, non-empty file for reading and yield its descriptor. Raises DataError."""
    try:
        # A pipe without a writer would block in open() for ever.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise DataError("no such file") from error
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("not a regular file")
        if status.st_size == 0:
            raise DataError("empty (0 bytes)")
        yield fd
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Container:
    """What the first bytes of a file say. channels: 0 where they were not looked for."""

    kind: Kind
    channels: int


def inspect(fd: int) -> Container:
    """Return what an open file holds by its first bytes; raise DataError if it visibly lacks its end."""
    size = os.fstat(fd).st_size
    head = os.pread(fd, 64, 0)
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return Container("WAV", _inspect_wav(fd, size))
    if head[:4] == b"fLaC" and len(head) >= 42:
        # STREAMINFO follows: 8 bytes in, 80 bits of block and frame sizes, 20 of rate, then 3 of channels - 1
        return Container("FLAC", (head[20] >> 1 & 7) + 1)
    if head[:4] == b"OggS":
        _inspect_ogg(fd, size)
        vorbis = head[28:35] == b"\x01vorbis"
        return Container(
            "VORBIS" if vorbis else "OTHER", int.from_bytes(head[39:40], "little") if vorbis else 0
        )
    if head[:4] == b"FORM":
        _check_present(size, 8 + int.from_bytes(head[4:8], "big"))
    return Container("OTHER", 0)


def _inspect_wav(fd: int, size: int) -> int:
    """Walk over the chunks of a RIFF file to its data. Return the channels; raise DataError if data is
    missing."""
    place, channels, data_size_64 = 12, 0, None
    for _ in range(_MOST_CHUNKS):
        header = os.pread(fd, 8, place)
        if len(header) < 8:
            break
        name, length = struct.unpack("<4sI", header)
        place += 8
        if name == b"fmt ":
            channels = int.from_bytes(os.pread(fd, 4, place)[2:4], "little")
        elif name == b"ds64":
            data_size_64 = int.from_bytes(os.pread(fd, 16, place)[8:16], "little")
        elif name == b"data":
            unknown = length == 0 or length >= _UNKNOWN_SIZE
            announced = data_size_64 if length == 0xFFFFFFFF and data_size_64 is not None else length
            if not unknown or announced != length:
                _check_present(size - place, announced)
            break
        place += length + length % 2
    return channels


def _check_present(present: int, announced: int) -> None:
    """Raise DataError if over 1 % of the announced bytes are missing."""
    if announced - present > LENGTH_TOLERANCE * announced:
        raise DataError(f"truncated: {present} of {announced} bytes are there")


def _inspect_ogg(fd: int, size: int) -> None:
    """Raise DataError if the last page of an Ogg file is not marked as the end of its stream."""
    tail = os.pread(fd, _OGG_PAGE, max(0, size - _OGG_PAGE))
    page = tail.rfind(b"OggS\0")
    # byte 5 of a page: 4 marks the last page of a stream (RFC 3533, section 6)
    if page < 0 or page + 6 > len(tail) or not tail[page + 5] & 4:
        raise DataError("truncated: the Ogg stream has no end")


@contextmanager
def _decoder(fd: int) -> Iterator[soundfile.SoundFile]:
    """Yield libsndfile's view of an open file. Raises DataError if it cannot be read as audio."""
    try:
        file = soundfile.SoundFile(fd, closefd=False)
    except (soundfile.LibsndfileError, TypeError) as error:
        # A TypeError is soundfile's complaint about headerless formats, whose rate it would have to be told.
        raise DataError(f"not readable as audio: {_text(error)}") from error
    with file:
        yield file


def _text(error: Exception) -> str:
    text = getattr(error, "error_string", "") or str(error)
    return text.strip().rstrip(".") or "libsndfile gives no reason"


def _check_header(info: AudioInfo) -> None:
    if info.num_samples < 1:
        raise DataError("has no samples")


def _skip_to(file: soundfile.SoundFile, start: int, cancelled: Callable[[], bool]) -> None:
    """Move to sample `start`: by seeking where that is exact, else by decoding."""
    exact = file.format == "FLAC" or (
        file.format in ("WAV", "WAVEX", "RF64") and file.subtype in SEEKABLE_WAV
    )
    if exact:
        file.seek(min(start, file.frames))
        return
    sink = np.empty((min(start, _BLOCK), file.channels), dtype=np.float32)
    while start > 0:
        _stop_if(cancelled)
        got = len(file.read(out=sink[: min(start, _BLOCK)]))
        if got == 0:
            return
        start -= got


def _read(file: soundfile.SoundFile, length: int, cancelled: Callable[[], bool]) -> Audio:
    """Return up to `length` samples as (n, channels) float32."""
    raw = np.empty((length, file.channels), dtype=np.float32)
    done = 0
    while done < length:
        _stop_if(cancelled)
        got = len(file.read(out=raw[done : done + 16 * _BLOCK]))
        if got == 0:
            break
        done += got
    return raw[:done]


class CancelledError(Exception):
    """Decoding was cut short, since nobody waits for it any more."""


def _stop_if(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError
