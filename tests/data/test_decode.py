# SPDX-License-Identifier: Apache-2.0
"""Decoding: crops equal to slices of the whole file, the downmix, what is bad and what is only noted."""

from __future__ import annotations

import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from masktrain.data import decode
from masktrain.data.decode import AudioInfo, Crop, check, downmix, probe, read_crop, try_crop
from masktrain.errors import DataError

FORMATS = [
    ("wav", "WAV", "PCM_U8"),
    ("wav", "WAV", "PCM_16"),
    ("wav", "WAV", "PCM_24"),
    ("wav", "WAV", "PCM_32"),
    ("wav", "WAV", "FLOAT"),
    ("wav", "WAV", "DOUBLE"),
    ("wav", "WAV", "ULAW"),
    ("wav", "WAV", "IMA_ADPCM"),
    ("wav", "WAVEX", "PCM_16"),
    ("wav", "RF64", "PCM_16"),
    ("flac", "FLAC", "PCM_16"),
    ("flac", "FLAC", "PCM_24"),
    ("ogg", "OGG", "VORBIS"),
    ("opus", "OGG", "OPUS"),
    ("mp3", "MP3", "MPEG_LAYER_III"),
    ("aiff", "AIFF", "PCM_16"),
]


def sound(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Return (samples, channels) float32 noise over a tone, inside [-0.9, 0.9]."""
    rng = np.random.default_rng(seed)
    tone = 0.4 * np.sin(np.arange(samples) * 0.05)[:, None]
    return np.clip(tone + 0.1 * rng.standard_normal((samples, channels)), -0.9, 0.9).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = 16000, **kwargs: str) -> Path:
    soundfile.write(path, samples, rate, **kwargs)
    return path


def crop_of(path: Path, start: int = 0, length: int | None = None) -> Crop:
    info = soundfile.info(path)
    return Crop(
        str(path), start, info.frames - start if length is None else length, info.frames, info.samplerate
    )


@pytest.mark.parametrize(("suffix", "format", "subtype"), FORMATS)
@pytest.mark.parametrize("channels", [1, 2])
def test_crops_are_slices_of_the_whole_file(
    tmp_path: Path, suffix: str, format: str, subtype: str, channels: int
) -> None:
    path = write(tmp_path / f"a.{suffix}", sound(150_000, channels), 48000, format=format, subtype=subtype)
    whole, rate = soundfile.read(path, dtype="float32", always_2d=True)
    expected = whole[:, 0] if channels == 1 else (whole[:, 0] + whole[:, 1]) / np.float32(2)
    n = len(whole)
    rng = np.random.default_rng(1)
    # the last fifth is where seeking in Ogg goes wrong
    starts = [0, 1, n - 700, *rng.integers(0, n - 700, 6), *rng.integers(4 * n // 5, n - 700, 8)]
    for start in starts:
        got = read_crop(Crop(str(path), int(start), 700, n, rate))
        # mpg123's floats depend in their last bit on how many samples are asked for at once
        atol = 1e-6 if format == "MP3" else 0
        np.testing.assert_allclose(got.samples, expected[start : start + 700], rtol=0, atol=atol)
        assert got.samples.dtype == np.float32
    np.testing.assert_allclose(read_crop(Crop(str(path), 0, n, n, rate)).samples, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("suffix", "format", "subtype"), FORMATS)
def test_probe_reads_the_header(tmp_path: Path, suffix: str, format: str, subtype: str) -> None:
    path = write(tmp_path / f"a.{suffix}", sound(5000, 2), 48000, format=format, subtype=subtype)
    written = soundfile.info(path)
    info = probe(path)
    assert info == AudioInfo(written.frames, 48000, 2, written.format, written.subtype)
    assert 5000 <= info.num_samples < 7100  # ADPCM fills up its last block, MP3 its last frame


@settings(deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 50), st.integers(1, 6)), elements=st.floats(-1, 1, width=32)
    )
)
def test_downmix_is_the_mean_of_the_channels(raw: np.ndarray) -> None:
    before = raw.copy()
    mono = downmix(raw)
    np.testing.assert_array_equal(raw, before)
    assert mono.shape == (len(raw),) and mono.dtype == np.float32 and mono.flags.c_contiguous
    np.testing.assert_allclose(mono, raw.astype(np.float64).mean(1), atol=raw.shape[1] * 2.0**-23)


def test_downmix_adds_the_channels_in_order() -> None:
    row = np.array([[1.0, 2.0**-25, 2.0**-25]], dtype=np.float32)
    assert downmix(row)[0] == np.float32(1.0) / np.float32(3)
    assert downmix(row[:, ::-1])[0] == np.float32(1.0 + 2.0**-24) / np.float32(3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 99])
def test_a_single_non_finite_sample_is_bad(value: float, place: int) -> None:
    raw = sound(100, 2)
    raw[place, 1] = value
    with pytest.raises(DataError, match="NaN or infinite"):
        check(raw)


def test_what_is_noted() -> None:
    assert check(sound(1000)) == ()
    assert check(np.zeros((1000, 1), np.float32)) == (decode.SILENT,)
    assert check(-np.zeros((1000, 2), np.float32)) == (decode.SILENT, decode.STEREO)
    assert check(sound(1000, 3)) == (decode.STEREO,)
    for count, notes in ((9, ()), (10, (decode.CLIPPED,))):
        raw = sound(10_000)
        raw[:count] = -1.0
        assert check(raw) == notes


@pytest.mark.parametrize("rate", [48000, 48001, 192_000])
def test_high_rates_are_noted(tmp_path: Path, rate: int) -> None:
    notes = read_crop(crop_of(write(tmp_path / "a.wav", sound(4000), rate))).notes
    assert notes == ((decode.HIGH_RATE,) if rate > 48000 else ())


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    samples = sound(4000)
    flac = write(tmp_path / "a.flac", samples)
    wrong = tmp_path / "b.wav"
    wrong.write_bytes(flac.read_bytes())
    assert probe(wrong).format == "FLAC"
    got = read_crop(crop_of(wrong, 100, 500))
    np.testing.assert_array_equal(got.samples, read_crop(crop_of(flac, 100, 500)).samples)
    assert got.notes == (decode.MISNAMED,)
    assert read_crop(crop_of(flac)).notes == ()


def damaged(folder: Path) -> dict[str, Path]:
    """Return files that cannot be used, by name."""
    whole = {name: write(folder / f"whole.{name}", sound(60_000)) for name in ("wav", "flac", "ogg", "aiff")}
    files = {name: folder / name for name in ("missing.wav", "folder.wav", "dangling.flac", "pipe.wav")}
    files["folder.wav"].mkdir()
    files["dangling.flac"].symlink_to(folder / "nowhere")
    os.mkfifo(files["pipe.wav"])
    contents = {
        "empty.wav": b"",
        "text.ogg": b"this is no audio\n" * 300,
        "text.wav": b"this is no audio\n" * 300,
        "header.wav": write(folder / "z.wav", sound(0)).read_bytes(),
        "header.ogg": write(folder / "z.ogg", sound(0)).read_bytes(),
        "riff.wav": b"RIFF\0\0\0\0WAVE" + bytes(20_000),
        "half.wav": whole["wav"].read_bytes()[:60_000],
        "start.flac": whole["flac"].read_bytes()[:200],
        "half.ogg": whole["ogg"].read_bytes()[: whole["ogg"].stat().st_size // 2],
        "half.aiff": whole["aiff"].read_bytes()[:60_000],
        "one.wav": b"R",
        "magic.ogg": b"OggS\0\4" + bytes(22) + b"\x01vorbis",
        "magic.flac": b"fLaC",
    }
    for name, content in contents.items():
        files[name] = folder / name
        files[name].write_bytes(content)
    return files


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    refused = {}
    damaged_files = damaged(tmp_path)
    for name, path in damaged_files.items():
        crop = Crop(str(path), 0, 8000, 60_000, 16000)
        assert isinstance(try_crop(crop), DataError), name
        try:
            probe(path)
        except DataError as error:
            refused[name] = str(error)
    # a FLAC file announces its samples at its beginning: only decoding finds that they are missing
    assert damaged_files.keys() - refused.keys() == {"start.flac"}
    assert refused["missing.wav"] == refused["dangling.flac"] == "no such file"
    assert refused["folder.wav"] == refused["pipe.wav"] == "not a regular file"
    assert refused["empty.wav"] == "empty (0 bytes)"
    assert refused["header.wav"] == refused["header.ogg"] == "has no samples"
    assert all(refused[f"half.{s}"].startswith("truncated") for s in ("wav", "ogg", "aiff"))
    assert all(refused[n].startswith("not readable as audio") for n in ("text.ogg", "text.wav"))


def test_paths_that_no_system_call_takes() -> None:
    for path in ("a\0b.wav", "x" * 5000):
        with pytest.raises(DataError, match="cannot be read"):
            probe(path)


@pytest.mark.parametrize("suffix", ["flac", "mp3"])
def test_a_file_cut_after_it_was_indexed(tmp_path: Path, suffix: str) -> None:
    """FLAC and MP3 announce their length at the beginning: the crop finds that the end is missing."""
    path = write(tmp_path / f"a.{suffix}", sound(200_000))
    crop = crop_of(path, 190_000, 5000)
    read_crop(crop)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"cannot be decoded|ends \d+ samples before"):
        read_crop(crop)


def test_bytes_that_were_flipped_are_no_fault_of_ours(tmp_path: Path) -> None:
    """Whatever the damage: samples, or a DataError."""
    rng = np.random.default_rng(5)
    for suffix in ("wav", "flac", "ogg", "mp3", "aiff"):
        content = write(tmp_path / f"a.{suffix}", sound(20_000)).read_bytes()
        for trial in range(25):
            broken = bytearray(content)
            reach = 200 if trial % 2 else len(broken)
            for place in rng.integers(0, reach, 8):
                broken[place] = rng.integers(256)
            path = tmp_path / f"b.{suffix}"
            path.write_bytes(broken)
            try:
                got = read_crop(Crop(str(path), 3000, 8000, 20_000, 16000))
            except DataError as error:
                assert str(error)
            else:
                assert 7800 <= len(got.samples) <= 8000 and np.isfinite(got.samples).all()


@pytest.mark.parametrize(
    ("claimed", "verdict"), [(10_000, ()), (10_099, (decode.SHORTER,)), (10_200, "says 10200")]
)
def test_a_length_that_differs_from_the_manifest(tmp_path: Path, claimed: int, verdict: object) -> None:
    path = write(tmp_path / "a.wav", sound(10_000))
    crop = Crop(str(path), 0, claimed, claimed, 16000)
    if isinstance(verdict, str):
        with pytest.raises(DataError, match=verdict):
            read_crop(crop)
    else:
        got = read_crop(crop)
        assert (len(got.samples), got.notes) == (10_000, verdict)


def test_another_rate_than_the_manifest_says_is_bad(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sound(10_000), 16000)
    with pytest.raises(DataError, match=r"16000 Hz.*8000 Hz"):
        read_crop(Crop(str(path), 0, 100, 10_000, 8000))


def test_too_short_for_the_front_end(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", sound(1))
    assert len(read_crop(Crop(str(path), 0, 1, 1, 16000)).samples) == 1
    with pytest.raises(DataError, match="too short: 1 samples, and the shortest input is 400"):
        read_crop(Crop(str(path), 0, 1, 1, 16000, min_samples=400))


def test_a_wav_written_into_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    """Writers that cannot seek back leave 0xFFFFFFFF as the length of the data."""
    path = write(tmp_path / "a.wav", sound(5000))
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = b"\xff" * 4
    path.write_bytes(content)
    assert probe(path).num_samples == 5000


def test_chunks_before_the_data_are_passed_over(tmp_path: Path) -> None:
    content = write(tmp_path / "a.wav", sound(5000)).read_bytes()
    place = content.index(b"data")
    path = tmp_path / "b.wav"
    extra = b"LIST" + struct.pack("<I", 9001) + bytes(9002)
    path.write_bytes(content[:place] + extra + content[place:])
    assert probe(path).num_samples == 5000
    path.write_bytes((content[:place] + extra + content[place:])[:-4000])
    with pytest.raises(DataError, match="truncated"):
        probe(path)


def two_hours(path: Path) -> int:
    """Write a sparse 2 h WAV at 48 kHz, 16 bit, with one sample of 0.5 each minute; return its samples."""
    samples, rate = 2 * 3600 * 48000, 48000
    with open(path, "wb") as file:
        size = 2 * samples
        file.write(b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt ")
        file.write(
            struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16) + b"data" + struct.pack("<I", size)
        )
        for minute in range(120):
            file.seek(44 + 2 * 60 * rate * minute)
            file.write(struct.pack("<h", 16384))
        file.truncate(44 + size)
    return samples


_CROP_AND_REPORT = """
import resource, sys, time
from masktrain.data.decode import Crop, read_crop
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
path, samples = sys.argv[1], int(sys.argv[2])
before, begin = peak(), time.perf_counter()
got = read_crop(Crop(path, 119 * 60 * 48000 - 7, 480_000, samples, 48000))
print(time.perf_counter() - begin, peak() - before, got.samples.nonzero()[0].tolist(), len(got.samples))
"""


def test_a_crop_of_two_hours_is_quick_and_small(tmp_path: Path) -> None:
    """In a process of its own, since the peak of memory is the process's."""
    path = tmp_path / "long.wav"
    samples = two_hours(path)
    done = subprocess.run(
        [sys.executable, "-c", _CROP_AND_REPORT, path, str(samples)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, kilobytes, rest = done.stdout.split(" ", 2)
    assert rest.strip() == "[7] 480000"
    assert float(seconds) < 1 and int(kilobytes) < 200_000


def test_a_long_compressed_file_is_decoded_in_bounded_memory(tmp_path: Path) -> None:
    """Ten minutes of Vorbis are 100 MB as float32; the last second is read through a buffer of blocks."""
    path = tmp_path / "long.ogg"
    with soundfile.SoundFile(path, "w", 44100, 1) as file:
        for minute in range(10):
            for second in np.split(sound(60 * 44100, seed=minute), 60):
                file.write(second)  # the Vorbis encoder of libsndfile keeps what it is handed on the stack
    crop = crop_of(path, 599 * 44100, 44100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = read_crop(crop)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    expected = sound(60 * 44100, seed=9)[-44100:, 0]
    assert np.corrcoef(got.samples, expected)[0, 1] > 0.9


def test_decoding_can_be_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "a.ogg", sound(300_000))
    begin = time.monotonic()
    with pytest.raises(decode.CancelledError):
        read_crop(crop_of(path, 200_000, 10_000), cancelled=lambda: True)
    assert time.monotonic() - begin < 1


def test_real_audio_decodes(data_dir: Path) -> None:
    paths = (
        sorted((data_dir / "esc10").rglob("*.ogg"))[::40] + sorted((data_dir / "fsdd").glob("*.wav"))[::300]
    )
    for path in paths:
        info = probe(path)
        whole, rate = soundfile.read(path, dtype="float32")
        assert (info.num_samples, info.sample_rate) == (len(whole), rate)
        start = 4 * len(whole) // 5
        np.testing.assert_array_equal(read_crop(crop_of(path, start)).samples, whole[start:])
