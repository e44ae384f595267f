# SPDX-License-Identifier: Apache-2.0
"""Batches are the same for any engine, number of workers, prefetch, start and division among ranks.

A closed loader leaves nothing behind.
"""

from __future__ import annotations

import csv
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from masktrain.data import dali_loader
from masktrain.data import loader as loader_module
from masktrain.data.config import DataConfig
from masktrain.data.crop import crop_length, crop_start
from masktrain.data.decode import Crop, probe
from masktrain.data.loader import Loader, choose_loader, default_workers, make_loader
from masktrain.data.manifest import Manifest, Source
from masktrain.data.order import clip_at
from masktrain.errors import ConfigError
from masktrain.types import AudioBatch

NO_DALI = dali_loader.unavailable()
DALI = pytest.param(
    "dali", marks=[pytest.mark.dali, pytest.mark.skipif(NO_DALI is not None, reason=f"DALI: {NO_DALI}")]
)
ENGINES = ["soundfile", DALI]

EXACT = [
    ("wav", "PCM_U8"),
    ("wav", "PCM_16"),
    ("wav", "PCM_24"),
    ("wav", "PCM_32"),
    ("wav", "FLOAT"),
    ("wav", "DOUBLE"),
    ("flac", "PCM_16"),
    ("flac", "PCM_24"),
]
LOSSY = [("ogg", "VORBIS"), ("mp3", "MPEG_LAYER_III"), ("opus", "OPUS")]


def manifest_of(paths: list[Path]) -> Manifest:
    """Return the manifest of files whose headers can be read."""
    infos = [probe(path) for path in paths]
    return Manifest(
        root="/",
        paths=[str(path.resolve())[1:] for path in paths],
        num_samples=np.array([i.num_samples for i in infos], dtype=np.int64),
        sample_rate=np.array([i.sample_rate for i in infos], dtype=np.int32),
        labels={},
        sources=[Source("test", "row")],
        source=np.zeros(len(paths), dtype=np.int32),
        rows=np.arange(len(paths), dtype=np.int64),
    )


def write(path: Path, samples: int, rate: int, channels: int, subtype: str) -> Path:
    rng = np.random.default_rng(samples + channels)
    tone = 0.4 * np.sin(np.arange(samples) * 0.03)[:, None]
    data = np.clip(tone + 0.2 * rng.standard_normal((samples, channels)), -0.99, 0.99)
    formats = {"opus": "OGG"}
    suffix = path.suffix[1:]
    soundfile.write(path, data, rate, format=formats.get(suffix, suffix.upper()), subtype=subtype)
    return path


def corpus(folder: Path, kinds: list[tuple[str, str]]) -> list[Path]:
    """Write files of several rates, lengths and channels of each kind."""
    paths = []
    for suffix, subtype in kinds:
        for i, (rate, seconds, channels) in enumerate(
            [
                (8000, 0.3, 1),
                (16000, 1.0, 2),
                (48000, 0.7, 1),
                (24000, 2.5, 2),
                (48000, 1.2, 3 if suffix != "mp3" else 1),
            ]
        ):
            path = folder / f"{subtype}_{i}.{suffix}"
            paths.append(write(path, int(rate * seconds), rate, channels, subtype))
    return paths


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """WAV and FLAC files of all encodings."""
    return manifest_of(corpus(tmp_path_factory.mktemp("exact"), EXACT))


@pytest.fixture(scope="module")
def lossy(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Vorbis, MP3 and Opus."""
    return manifest_of(corpus(tmp_path_factory.mktemp("lossy"), LOSSY))


def make(
    manifest: Manifest,
    *,
    loader: str = "soundfile",
    workers: int = 2,
    prefetch: int = 2,
    clip_seconds: float | None = 0.8,
    seed: int = 5,
    batch_size: int = 12,
    rank: int = 0,
    world_size: int = 1,
    accumulation: int = 1,
) -> Loader:
    config = DataConfig(loader=loader, workers=workers, prefetch=prefetch, clip_seconds=clip_seconds)  # type: ignore[arg-type]
    made, _ = make_loader(
        manifest,
        config,
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        accumulation=accumulation,
        min_samples=lambda rate: rate // 100,
    )
    return made


def steps(made: Loader, count: int, start: int = 0) -> list[list[AudioBatch]]:
    """Return `count` steps and close the loader."""
    try:
        return list(islice(made.iterate(start), count))
    finally:
        made.close()


def flat(taken: list[list[AudioBatch]]) -> list[AudioBatch]:
    """Return the micro-batches of all steps."""
    return [batch for step in taken for batch in step]


def assert_same(a: list[list[AudioBatch]], b: list[list[AudioBatch]], atol: float = 0) -> None:
    assert [len(step) for step in a] == [len(step) for step in b]
    for x, y in zip(flat(a), flat(b), strict=True):
        assert (x.lengths, x.sample_rates) == (y.lengths, y.sample_rates)
        assert torch.equal(x.clip_ids, y.clip_ids) and torch.equal(x.starts, y.starts)
        torch.testing.assert_close(x.samples, y.samples, rtol=0, atol=atol)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_is_what_order_and_crop_say(exact: Manifest, engine: str) -> None:
    n = len(exact)
    for number, step in enumerate(steps(make(exact, loader=engine, accumulation=2), 8)):
        assert [len(batch.lengths) for batch in step] == [6, 6]
        for part, batch in enumerate(step):
            assert batch.samples.dtype == torch.float32 and batch.samples.shape == (sum(batch.lengths),)
            assert batch.clip_ids.dtype == batch.starts.dtype == torch.int64
            for i, samples in enumerate(batch.samples.split(batch.lengths)):
                epoch, clip = clip_at(5, number * 12 + part * 6 + i, n)
                total, rate = int(exact.num_samples[clip]), int(exact.sample_rate[clip])
                length = crop_length(total, rate, 0.8)
                start = crop_start(5, epoch, clip, total, length)
                assert (batch.clip_ids[i], batch.starts[i]) == (clip, start)
                assert (batch.lengths[i], batch.sample_rates[i]) == (length, rate)
                raw, _ = soundfile.read(exact.path(clip), dtype="float32", always_2d=True)
                expected = raw[start : start + length].astype(np.float64).mean(1)
                np.testing.assert_allclose(samples.numpy(), expected, rtol=0, atol=2e-7)


@pytest.mark.dali
@pytest.mark.skipif(NO_DALI is not None, reason=f"DALI: {NO_DALI}")
@pytest.mark.parametrize("clip_seconds", [None, 0.5])
def test_both_engines_give_the_same_bits_of_wav_and_flac(exact: Manifest, clip_seconds: float | None) -> None:
    a = make(exact, loader="dali", clip_seconds=clip_seconds)
    from_dali = steps(a, 8)
    assert_same(from_dali, steps(make(exact, clip_seconds=clip_seconds), 8))
    passed_on = a.passed_on()
    if clip_seconds is None:
        assert passed_on == {}
    else:
        assert list(passed_on) == ["WAV or FLAC of over 1.5 times the crop, where seeking is faster"]


@pytest.mark.dali
@pytest.mark.skipif(NO_DALI is not None, reason=f"DALI: {NO_DALI}")
def test_both_engines_agree_on_lossy_files(lossy: Manifest) -> None:
    a = make(lossy, loader="dali")
    assert_same(steps(a, 6), steps(make(lossy), 6), atol=1e-6)
    assert list(a.passed_on()) == ["not WAV, FLAC or Vorbis"]
    assert a.passed_on()["not WAV, FLAC or Vorbis"] >= 6 * 12 * 2 // 3 - 12


def real(data_dir: Path, each: int) -> Manifest:
    paths = []
    for name in ("esc10.csv", "fsdd.csv"):
        with open(data_dir / name) as file:
            rows = list(csv.DictReader(file))
        paths += [data_dir / row["path"] for row in rows[:: len(rows) // each]]
    return manifest_of(paths)


@pytest.mark.dali
@pytest.mark.skipif(NO_DALI is not None, reason=f"DALI: {NO_DALI}")
def test_both_engines_agree_on_real_audio(data_dir: Path) -> None:
    manifest = real(data_dir, 20)
    a = make(manifest, loader="dali", clip_seconds=10.0, batch_size=20)
    from_dali = steps(a, 2)
    assert a.passed_on() == {}
    from_soundfile = steps(make(manifest, clip_seconds=10.0, batch_size=20), 2)
    assert_same(from_dali, from_soundfile, atol=1e-6)
    for x, y in zip(flat(from_dali), flat(from_soundfile), strict=True):
        for p, q, rate in zip(
            x.samples.split(x.lengths), y.samples.split(y.lengths), x.sample_rates, strict=True
        ):
            if rate == 8000:  # the digits are WAV
                assert torch.equal(p, q)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_sequence_equals_the_undisturbed_one(exact: Manifest, engine: str) -> None:
    whole = steps(make(exact, loader=engine), 12)
    for start in (1, 3, 4, 11):
        assert_same(steps(make(exact, loader=engine), 12 - start, start), whole[start:])


def test_a_second_iteration_takes_the_place_of_the_first(exact: Manifest) -> None:
    whole = steps(make(exact), 6)
    made = make(exact)
    first = made.iterate(0)
    next(first)
    again = list(islice(made.iterate(2), 4))
    made.close()
    assert_same(again, whole[2:])


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (3, 5), (8, 2)])
@pytest.mark.parametrize("engine", ENGINES)
def test_workers_and_prefetch_change_nothing(
    exact: Manifest, engine: str, workers: int, prefetch: int
) -> None:
    engine = "soundfile" if workers == 0 else engine
    assert_same(
        steps(make(exact, loader=engine, workers=workers, prefetch=prefetch), 6),
        steps(make(exact, workers=2), 6),
    )


@pytest.mark.parametrize(("world", "accumulation"), [(1, 2), (2, 1), (2, 2), (3, 1), (4, 3)])
def test_ranks_and_micro_batches_make_up_the_batch(exact: Manifest, world: int, accumulation: int) -> None:
    whole = steps(make(exact), 4)
    ranks = [steps(make(exact, rank=r, world_size=world, accumulation=accumulation), 4) for r in range(world)]
    for number, (expected,) in enumerate(whole):
        parts = [batch for rank in ranks for batch in rank[number]]
        assert len(parts) == world * accumulation
        assert torch.equal(torch.cat([p.samples for p in parts]), expected.samples)
        assert torch.equal(torch.cat([p.clip_ids for p in parts]), expected.clip_ids)
        assert sum((p.lengths for p in parts), ()) == expected.lengths


def test_each_epoch_holds_each_clip_once(exact: Manifest) -> None:
    batches = flat(steps(make(exact, batch_size=8), 10))
    ids = torch.cat([b.clip_ids for b in batches]).view(2, 40)
    assert torch.equal(ids.sort(1).values, torch.arange(40).expand(2, 40))
    assert not torch.equal(ids[0], ids[1])


def test_a_batch_may_exceed_the_corpus(exact: Manifest) -> None:
    ((batch,),) = steps(make(exact, batch_size=90), 1)
    assert torch.bincount(batch.clip_ids, minlength=40).tolist() <= [3] * 40
    assert batch.clip_ids[:40].sort().values.tolist() == list(range(40))


def test_crop_start_takes_the_beginning(exact: Manifest) -> None:
    config = DataConfig(crop="start", clip_seconds=0.2, workers=1, loader="soundfile")
    made, _ = make_loader(
        exact, config, seed=0, batch_size=40, rank=0, world_size=1, accumulation=1, min_samples=lambda rate: 1
    )
    ((batch,),) = steps(made, 1)
    assert batch.starts.tolist() == [0] * 40


def test_seeds_differ(exact: Manifest) -> None:
    a, b = steps(make(exact, seed=1), 1), steps(make(exact, seed=2), 1)
    assert not torch.equal(a[0][0].clip_ids, b[0][0].clip_ids)


def test_waiting_is_measured(exact: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(crop: Crop, cancelled: object) -> object:
        time.sleep(0.01)
        return real_try(crop)

    import masktrain.data.soundfile_loader as soundfile_loader

    real_try = soundfile_loader.try_crop
    monkeypatch.setattr(soundfile_loader, "try_crop", slow)
    made = make(exact, workers=1)
    it = made.iterate(0)
    next(it)
    assert 0.1 < made.wait_seconds < 5
    assert made.wait_seconds == 0
    made.close()


def masktrain_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("masktrain")]


def native_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("taken", [None, 0, 1, 5])
def test_close_leaves_no_thread_and_is_quick(exact: Manifest, engine: str, taken: int | None) -> None:
    steps(make(exact, loader=engine), 1)  # what numpy and DALI start once
    before = native_threads()
    made = make(exact, loader=engine)
    if taken is not None:
        assert len(list(islice(made.iterate(0), taken))) == taken
    begin = time.monotonic()
    made.close()
    made.close()
    assert time.monotonic() - begin < 1
    assert masktrain_threads() == []
    if Path("/proc/self/task").is_dir():
        deadline = time.monotonic() + 2  # a thread is joined a little before the system has taken it away
        while native_threads() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert native_threads() <= before
    with pytest.raises(RuntimeError, match="closed"):
        made.iterate(0)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_in_a_worker_reaches_the_consumer(
    exact: Manifest, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    import masktrain.data.soundfile_loader as soundfile_loader

    def broken(crop: Crop, cancelled: object) -> object:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(soundfile_loader, "try_crop", broken)
    made = make(exact, workers=workers)
    with pytest.raises(ZeroDivisionError, match="a fault of ours"):
        next(made.iterate(0))
    made.close()
    assert masktrain_threads() == []


def test_an_exception_in_the_consumer_stops_the_reading(exact: Manifest) -> None:
    made = make(exact)
    with pytest.raises(KeyboardInterrupt):
        try:
            for _ in made.iterate(0):
                raise KeyboardInterrupt
        finally:
            made.close()
    assert masktrain_threads() == []


def test_close_does_not_wait_for_a_long_file(tmp_path: Path) -> None:
    """Decoding Vorbis up to a late crop takes seconds; closing cuts it short."""
    path = tmp_path / "long.ogg"
    second = 0.1 * np.random.default_rng(0).standard_normal(44100)
    with soundfile.SoundFile(path, "w", 44100, 1) as file:
        for _ in range(200):
            file.write(second)
    made = make(manifest_of([path]), batch_size=64, workers=2)
    made.iterate(0)
    time.sleep(0.2)
    begin = time.monotonic()
    made.close()
    assert time.monotonic() - begin < 1
    assert masktrain_threads() == []


_ENDLESS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_loaders
made = test_loaders.make(test_loaders.manifest_of([Path(p) for p in sys.argv[3:]]), loader=sys.argv[2])
try:
    for number, _ in enumerate(made.iterate(0)):
        if number == 3:
            print("running", flush=True)
finally:
    made.close()
"""


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_process(exact: Manifest, engine: str, number: signal.Signals) -> None:
    paths = [exact.path(i) for i in range(6)]
    with subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(Path(__file__).parent), engine, *paths],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=10)
        assert process.returncode == -number
        assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
        with pytest.raises(ProcessLookupError):  # nobody is left in its process group
            os.killpg(process.pid, 0)


def test_a_loader_that_was_never_closed_does_not_hold_the_process(exact: Manifest) -> None:
    code = _ENDLESS.replace("finally:\n    made.close()", "except ValueError:\n    pass").replace(
        'print("running", flush=True)', "sys.exit(7)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), "soundfile", exact.path(0)], timeout=30
    )
    assert done.returncode == 7


def test_the_reason_names_the_engine() -> None:
    assert choose_loader("soundfile", 2) == ("soundfile", "soundfile in 2 threads: asked for")
    name, reason = choose_loader("auto")
    assert name == ("soundfile" if NO_DALI else "dali")
    if NO_DALI:
        assert NO_DALI in reason
    assert choose_loader("auto", 0) == (
        "soundfile",
        "soundfile in the training thread: DALI was passed over (data.workers 0 leaves it no thread)",
    )


def test_dali_that_cannot_serve_is_an_error_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali_loader, "unavailable", lambda: "it is not installed")
    with pytest.raises(ConfigError, match=r"'dali' cannot serve: it is not installed\. Install"):
        choose_loader("dali", 2)
    assert choose_loader("auto", 1) == (
        "soundfile",
        "soundfile in 1 thread: DALI was passed over (it is not installed)",
    )
    with pytest.raises(ConfigError, match=r"data\.workers 0"):
        choose_loader("dali", 0)


def test_a_broken_dali_is_passed_over(tmp_path: Path) -> None:
    """A DALI that is there but does not import, as with a library that does not fit."""
    package = tmp_path / "nvidia" / "dali"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("raise OSError('libdali.so: wrong ELF class')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from masktrain.data.loader import choose_loader; "
    code += "print(choose_loader('auto', 1)[1])"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert "its probe failed: OSError: libdali.so: wrong ELF class" in done.stdout, done.stderr


def test_workers_by_default_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)
    assert default_workers() == loader_module.MOST_WORKERS
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert default_workers() == 1


@pytest.mark.parametrize("what", ["batch", "rank", "crop"])
def test_what_does_not_fit_is_refused(exact: Manifest, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        if what == "batch":
            make(exact, batch_size=10, world_size=4)
        elif what == "rank":
            make(exact, rank=2, world_size=2)
        else:
            make(exact, clip_seconds=0.001)
    assert {"batch": "nearest 8 or 12", "rank": "allowed are 0 to 1", "crop": "allowed is 0.01 s"}[
        what
    ] in str(caught.value)


def test_log_is_quiet_on_good_files(exact: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="masktrain.data"):
        steps(make(exact), 8)
    assert caplog.records == []
