# SPDX-License-Identifier: Apache-2.0
"""Bad clips are named, counted and replaced alike by both engines; odd ones noted; too many stop the run."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from masktrain.data import dali_loader, decode
from masktrain.data.bad_clips import DRAWS, BadClips, replacement, replacements
from masktrain.data.config import DataConfig
from masktrain.data.loader import Loader, make_loader
from masktrain.data.manifest import Manifest, Source
from masktrain.data.order import clip_at
from masktrain.errors import DataError
from masktrain.kernels.philox import Purpose, host_words
from masktrain.types import AudioBatch

NO_DALI = dali_loader.unavailable()
ENGINES = [
    "soundfile",
    pytest.param(
        "dali", marks=[pytest.mark.dali, pytest.mark.skipif(NO_DALI is not None, reason=f"DALI: {NO_DALI}")]
    ),
]
RATE = 16000
SAMPLES = 8000


def sound(samples: int = SAMPLES, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (samples, channels)).astype(np.float32)


def manifest_of(
    paths: list[Path], samples: int | list[int] = SAMPLES, rates: int | list[int] = RATE
) -> Manifest:
    """Return a manifest that says of each file what it is told, as one from before the files went bad."""
    n = len(paths)
    return Manifest(
        root="/",
        paths=[str(path)[1:] for path in paths],
        num_samples=np.broadcast_to(np.array(samples, dtype=np.int64), n).copy(),
        sample_rate=np.broadcast_to(np.array(rates, dtype=np.int32), n).copy(),
        labels={},
        sources=[Source("clips.csv", "line")],
        source=np.zeros(n, dtype=np.int32),
        rows=np.arange(2, n + 2, dtype=np.int64),
    )


def good_files(folder: Path, count: int) -> list[Path]:
    """Write `count` good clips of several formats, all SAMPLES long."""
    folder.mkdir(exist_ok=True)
    paths = [folder / f"good{i}.{('wav', 'flac', 'ogg')[i % 3]}" for i in range(count)]
    for i, path in enumerate(paths):
        soundfile.write(path, sound(seed=i), RATE)
    return paths


def make(
    manifest: Manifest, engine: str = "soundfile", *, workers: int = 2, batch_size: int = 10, **kwargs: int
) -> Loader:
    config = DataConfig(loader=engine, workers=workers, clip_seconds=0.4)  # type: ignore[arg-type]
    made, _ = make_loader(
        manifest,
        config,
        seed=3,
        batch_size=batch_size,
        rank=kwargs.get("rank", 0),
        world_size=kwargs.get("world_size", 1),
        accumulation=1,
        min_samples=lambda rate: rate // 40,
    )
    return made


def take(made: Loader, count: int, start: int = 0) -> list[AudioBatch]:
    """Return the batches of `count` steps."""
    return [batch for step in islice(made.iterate(start), count) for batch in step]


def _write(data: np.ndarray, rate: int = RATE, **kwargs: str) -> Callable[[Path], None]:
    return lambda path: soundfile.write(path, data, rate, **kwargs)


def _cut(share: float) -> Callable[[Path], None]:
    def make_file(path: Path) -> None:
        soundfile.write(path, sound(), RATE)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])

    return make_file


def _nan(path: Path) -> None:
    data = sound()
    data[:] = np.nan
    soundfile.write(path, data, RATE, subtype="FLOAT")


def _one_nan(path: Path) -> None:
    data = sound()
    data[4000] = np.nan  # in every crop of 6400 of 8000 samples
    soundfile.write(path, data, RATE, subtype="FLOAT")


def _corrupt(path: Path) -> None:
    soundfile.write(path, sound(), RATE)
    content = bytearray(path.read_bytes())
    content[300:] = bytes(len(content) - 300)
    path.write_bytes(content)


def _dangling(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.wav", lambda path: None, "no such file"),
    "dangling link": ("a.flac", _dangling, "no such file"),
    "folder": ("a.wav", lambda path: path.mkdir(), "not a regular file"),
    "empty": ("a.wav", lambda path: path.touch(), "empty (0 bytes)"),
    "text named .ogg": ("a.ogg", lambda path: path.write_text("no audio\n" * 99), "not readable as audio"),
    "text named .wav": ("a.wav", lambda path: path.write_text("no audio\n" * 99), "not readable as audio"),
    "truncated wav": ("a.wav", _cut(0.6), "truncated"),
    "truncated flac": ("a.flac", _cut(0.5), "cannot be decoded"),
    "truncated ogg": ("a.ogg", _cut(0.5), "truncated"),
    "truncated mp3": ("a.mp3", _cut(0.3), "samples before"),
    "corrupt flac": ("a.flac", _corrupt, "cannot be decoded"),
    "header only wav": ("a.wav", _write(sound(0)), "has no samples"),
    "header only ogg": ("a.ogg", _write(sound(0)), "has no samples"),
    "nan": ("a.wav", _nan, "NaN"),
    "one nan": ("a.wav", _one_nan, "NaN"),
    "shorter than the manifest says": (
        "a.wav",
        _write(sound(7900)),
        "holds 7900 samples, and the manifest says 8000",
    ),
    "longer than the manifest says": (
        "a.flac",
        _write(sound(9000)),
        "holds 9000 samples, and the manifest says 8000",
    ),
    "another rate": ("a.wav", _write(sound(), 8000), "8000 Hz, and the manifest says 16000 Hz"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_clip_is_named_counted_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, engine: str, name: str
) -> None:
    file, make_file, reason = BAD[name]
    make_file(tmp_path / file)
    paths = [*good_files(tmp_path / "good", 9), tmp_path / file]
    made = make(manifest_of(paths), engine)
    with caplog.at_level(logging.WARNING, logger="masktrain.data"):
        batches = take(made, 3)
    made.close()
    for epoch, batch in enumerate(batches):
        order = [clip_at(3, 10 * epoch + i, 10)[1] for i in range(10)]
        stand_in = next(replacements(3, epoch, 9, 10))
        assert batch.clip_ids.tolist() == [stand_in if clip == 9 else clip for clip in order]
        assert batch.lengths == (6400,) * 10 and batch.samples.isfinite().all()
        assert batch.samples.view(10, 6400).abs().amax(1).min() > 0.1
    (bad,) = made.bad.bad()
    assert bad.path == str(tmp_path / file) and reason in bad.reason and bad.where == "clips.csv line 11"
    (record,) = caplog.records
    assert str(bad) in record.getMessage()


@pytest.mark.dali
@pytest.mark.skipif(NO_DALI is not None, reason=f"DALI: {NO_DALI}")
def test_both_engines_give_the_same_batches_around_bad_clips(tmp_path: Path) -> None:
    """Ten kinds of bad files at once, some of which take a DALI batch with them."""
    paths = good_files(tmp_path / "good", 60)
    for i, name in enumerate(list(BAD)[4:14]):
        file, make_file, _ = BAD[name]
        (tmp_path / str(i)).mkdir()
        make_file(tmp_path / str(i) / file)
        paths.insert(6 * i, tmp_path / str(i) / file)
    results = {}
    for engine in ("soundfile", "dali"):
        made = make(manifest_of(paths), engine, batch_size=70)
        results[engine] = take(made, 3), {bad.path: bad.reason for bad in made.bad.bad()}
        passed_on = made.passed_on()
        made.close()
    assert "in a batch on which DALI failed" in passed_on
    assert results["dali"][1] == results["soundfile"][1] and len(results["dali"][1]) == 10
    for a, b in zip(results["dali"][0], results["soundfile"][0], strict=True):
        assert (
            torch.equal(a.clip_ids, b.clip_ids) and torch.equal(a.starts, b.starts) and a.lengths == b.lengths
        )
        torch.testing.assert_close(a.samples, b.samples, rtol=0, atol=1e-6)


NOTED: dict[str, tuple[str, Callable[[Path], object], int, str]] = {
    "silent": ("a.wav", _write(np.zeros((SAMPLES, 1))), RATE, decode.SILENT),
    "stereo": ("a.flac", _write(sound(channels=2)), RATE, decode.STEREO),
    "six channels": ("a.wav", _write(sound(channels=6)), RATE, decode.STEREO),
    "192 kHz": ("a.wav", _write(sound(), 192_000), 192_000, decode.HIGH_RATE),
    "clipped": ("a.wav", _write(np.sign(sound())), RATE, decode.CLIPPED),
    "beyond full scale": ("a.wav", _write(1000 * sound(), subtype="FLOAT"), RATE, decode.CLIPPED),
    "flac named .wav": ("a.wav", _write(sound(), format="FLAC"), RATE, decode.MISNAMED),
    "wav named .ogg": ("a.ogg", _write(sound(), format="WAV", subtype="PCM_16"), RATE, decode.MISNAMED),
    "a little short": ("a.wav", _write(sound(7950)), RATE, decode.SHORTER),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NOTED)
def test_an_odd_clip_is_used_and_noted_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, engine: str, name: str
) -> None:
    file, make_file, rate, text = NOTED[name]
    make_file(tmp_path / file)
    paths = [*good_files(tmp_path / "good", 9), tmp_path / file]
    config = DataConfig(loader=engine, workers=1, clip_seconds=None)  # type: ignore[arg-type]
    made, _ = make_loader(
        manifest_of(paths, rates=[RATE] * 9 + [rate]),
        config,
        seed=3,
        batch_size=10,
        rank=0,
        world_size=1,
        accumulation=1,
        min_samples=lambda rate: 1,
    )
    with caplog.at_level(logging.INFO, logger="masktrain.data"):
        batches = take(made, 3)
    made.close()
    for batch in batches:
        assert sorted(batch.clip_ids.tolist()) == list(range(10))
        raw, _ = soundfile.read(tmp_path / file, dtype="float32", always_2d=True)
        mine = dict(zip(batch.clip_ids.tolist(), batch.samples.split(batch.lengths), strict=True))[9]
        np.testing.assert_allclose(mine.numpy(), raw.mean(1), rtol=1e-5, atol=1e-6)
    assert len(made.bad) == 0
    assert made.bad.notes() == {text: (1, str(tmp_path / file))}
    (record,) = caplog.records
    assert str(tmp_path / file) in record.getMessage() and text in record.getMessage()


@pytest.mark.parametrize("engine", ENGINES)
def test_one_sample_is_too_short_for_the_front_end_and_known_at_once(tmp_path: Path, engine: str) -> None:
    path = tmp_path / "one.wav"
    soundfile.write(path, sound(1), RATE)
    made = make(manifest_of([*good_files(tmp_path / "good", 9), path], [SAMPLES] * 9 + [1]), engine)
    (bad,) = made.bad.bad()
    assert bad.reason == "too short: 1 samples, and the shortest input is 400"
    assert 9 not in torch.cat([b.clip_ids for b in take(made, 4)])
    made.close()
    assert len(made.bad) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_a_two_hour_wav_among_short_clips(tmp_path: Path, engine: str) -> None:
    path, samples, rate = tmp_path / "long.wav", 2 * 3600 * 48000, 48000
    with open(path, "wb") as file:
        file.write(b"RIFF" + struct.pack("<I", 36 + 2 * samples) + b"WAVEfmt ")
        file.write(struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16) + b"data")
        file.write(struct.pack("<I", 2 * samples))
        file.truncate(44 + 2 * samples)
    manifest = manifest_of(
        [*good_files(tmp_path / "good", 3), path], [SAMPLES] * 3 + [samples], [RATE] * 3 + [rate]
    )
    made = make(manifest, engine, batch_size=4)
    batches = take(made, 20)
    made.close()
    starts = [int(b.starts[b.clip_ids == 3]) for b in batches]
    assert len(set(starts)) == 20 and max(starts) > samples // 2
    assert made.bad.notes() == {decode.SILENT: (1, str(path))} and len(made.bad) == 0


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_replacements_and_record_do_not_depend_on_workers_or_the_start(
    tmp_path: Path, engine: str, workers: int
) -> None:
    paths = good_files(tmp_path, 30)
    for i in range(0, 30, 3):
        paths[i].unlink()
    manifest = manifest_of(paths)
    reference = make(manifest)
    whole = take(reference, 9)
    reference.close()
    made = make(manifest, "soundfile" if workers == 0 else engine, workers=workers)
    got = take(made, 9)
    assert json.dumps(made.bad.state()) == json.dumps(reference.bad.state())
    made.close()
    later = make(manifest)
    for a, b in zip(whole, [*got[:4], *take(later, 5, start=4)], strict=True):
        assert torch.equal(a.clip_ids, b.clip_ids) and torch.equal(a.starts, b.starts)
        torch.testing.assert_close(a.samples, b.samples, rtol=0, atol=1e-6)
    later.close()


def test_the_record_follows_the_batches_handed_out(tmp_path: Path) -> None:
    """What was read ahead does not count, or a resumed run would know more than the undisturbed one."""
    paths = good_files(tmp_path, 40)
    for path in paths[:10]:
        path.unlink()
    made = make(manifest_of(paths))
    counts = []
    for number, (batch,) in enumerate(islice(made.iterate(0), 4)):
        drawn = {clip_at(3, i, 40)[1] for i in range(10 * (number + 1))}
        counts.append(len(made.bad))
        assert {c for c in drawn if c < 10} <= {
            int(p.path.split("good")[1].split(".")[0]) for p in made.bad.bad()
        }
        assert (batch.clip_ids >= 10).all()
    made.close()
    assert counts == sorted(counts) and counts[0] < counts[-1] == 10


def test_ranks_together_replace_as_one_process_does(tmp_path: Path) -> None:
    paths = good_files(tmp_path, 20)
    for i in (1, 5, 9, 13):
        paths[i].unlink()
    manifest = manifest_of(paths)
    one = make(manifest)
    whole = take(one, 6)
    one.close()
    parts = []
    for rank in range(2):
        made = make(manifest, rank=rank, world_size=2)
        parts.append(take(made, 6))
        made.close()
    for expected, a, b in zip(whole, *parts, strict=True):
        assert torch.equal(expected.clip_ids, torch.cat([a.clip_ids, b.clip_ids]))
        assert torch.equal(expected.samples, torch.cat([a.samples, b.samples]))


@pytest.mark.parametrize("engine", ENGINES)
def test_too_many_bad_clips_stop_the_run(tmp_path: Path, engine: str) -> None:
    paths = good_files(tmp_path, 40)
    for path in paths[:11]:
        path.unlink()
    made = make(manifest_of(paths), engine)
    with pytest.raises(DataError, match=r"11 of 40 clips cannot be used; at most 10") as caught:
        take(made, 8)
    made.close()
    assert str(caught.value).count("no such file") == 3
    assert str(made.bad.bad()[0]) in str(caught.value)


def test_too_many_short_clips_stop_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="11 of 40 clips cannot be used"):
        make(manifest_of(good_files(tmp_path, 40), [399] * 11 + [SAMPLES] * 29))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_corpus_without_a_usable_clip_ends_in_an_error(tmp_path: Path, engine: str) -> None:
    made = make(manifest_of([tmp_path / f"{i}.wav" for i in range(4)]), engine, batch_size=2)
    with pytest.raises(DataError, match="No clip can be used"):
        take(made, 1)
    assert len(made.bad) == 4
    made.close()
    with pytest.raises(DataError, match="No clip can be used; the first"):
        make(manifest_of([tmp_path / f"{i}.wav" for i in range(4)], 10))
    with pytest.raises(DataError, match="no usable clips"):
        make(manifest_of([]))


def test_one_good_clip_among_ten_bad_ones_serves_for_all(tmp_path: Path) -> None:
    manifest = manifest_of([tmp_path / f"{i}.wav" for i in range(10)] + good_files(tmp_path / "good", 1))
    made = make(manifest, batch_size=11)
    assert [b.clip_ids.tolist() for b in take(made, 3)] == [[10] * 11] * 3
    made.close()


@given(seed=st.integers(0, 2**48 - 1), epoch=st.integers(0, 2**32 - 1), n=st.integers(1, 200), data=st.data())
def test_replacements_are_drawn_then_complete(seed: int, epoch: int, n: int, data: st.DataObject) -> None:
    clip = data.draw(st.integers(0, n - 1))
    words = host_words(seed, epoch, clip, DRAWS, purpose=Purpose.REPLACE)
    drawn = [replacement(seed, epoch, clip, attempt, n) for attempt in range(DRAWS)]
    assert drawn == [word * n >> 32 for word in words]
    others = list(replacements(seed, epoch, clip, n))
    assert sorted(others) == [i for i in range(n) if i != clip]
    assert others[: len(set(drawn) - {clip})] == list(dict.fromkeys(c for c in drawn if c != clip))


def test_the_record_survives_json(tmp_path: Path) -> None:
    manifest = manifest_of([tmp_path / f"{i}.wav" for i in range(1000)])
    record = BadClips(manifest)
    for clip in (5, 700, 5, 3):
        record.add(clip, f"reason {clip}")
    for clip in [*range(0, 1000, 2), 0, 2]:
        record.add_note(clip, decode.STEREO)
    record.add_note(999, decode.SILENT)
    state = json.loads(json.dumps(record.state()))
    other = BadClips(manifest)
    other.load_state(state)
    assert other.bad() == record.bad() and [b.reason for b in other.bad()] == [
        "reason 5",
        "reason 700",
        "reason 3",
    ]
    assert other.notes() == record.notes()
    assert other.notes()[decode.STEREO] == (500, manifest.path(0))
    other.add_note(4, decode.STEREO)
    other.add_note(1, decode.STEREO)
    assert other.notes()[decode.STEREO][0] == 501
    assert other.state() != state


def test_loading_a_record_does_not_name_its_clips_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = manifest_of([tmp_path / f"{i}.wav" for i in range(100)])
    record = BadClips(manifest)
    record.add(1, "gone")
    record.add_note(2, decode.STEREO)
    caplog.clear()
    other = BadClips(manifest)
    with caplog.at_level(logging.INFO, logger="masktrain.data"):
        other.load_state(record.state())
        other.add(1, "gone")
        other.add_note(3, decode.STEREO)
    assert caplog.records == []


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"bad": 3, "notes": {}},
        {"bad": [[100, "x"]], "notes": {}},
        {"bad": [["1", "x"]], "notes": {}},
        {"bad": [[True, "x"]], "notes": {}},
        {"bad": [], "notes": []},
        {"bad": [], "notes": {decode.SILENT: {"first": 0, "clips": "!"}}},
        {"bad": [], "notes": {decode.SILENT: {"first": 0, "clips": "AAAA"}}},
        {"bad": [], "notes": {decode.SILENT: {"first": 0}}},
        None,
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, state: object) -> None:
    record = BadClips(manifest_of([tmp_path / f"{i}.wav" for i in range(100)]))
    with pytest.raises(DataError, match="record of bad clips is damaged"):
        record.load_state(state)  # type: ignore[arg-type]


def test_a_record_with_too_many_stops(tmp_path: Path) -> None:
    manifest = manifest_of([tmp_path / f"{i}.wav" for i in range(100)])
    with pytest.raises(DataError, match="11 of 100 clips"):
        BadClips(manifest).load_state({"bad": [[i, "gone"] for i in range(11)], "notes": {}})
