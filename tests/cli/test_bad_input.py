# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong ends in one clear message and status 2, or is counted, named and replaced.

Commands run in this process (tests/cli/conftest.py), so an exception that is no clean exit fails the test.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import soundfile

from masktrain.data.decode import Crop, Decoded, try_crop

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
SMALL = ["run", "--recipe", "mae_ast_frame", *runs.SMALL, "--train.pictures", "0"]
CHECKPOINT_FILES = ("manifest.json", "state.json", "model.safetensors", "optimizer.safetensors")


def refused(done: subprocess.CompletedProcess[str], *named: str | Path) -> str:
    """Check that a command ended in one message and status 2 that names `named`; return the message."""
    lines = [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("note: --")]
    message = "".join(lines).removeprefix("masktrain: ")
    assert done.returncode == 2, done.stdout + done.stderr
    assert lines[0].startswith("masktrain: ") and len(lines) == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for name in named:
        assert str(name) in message, f"{name} is not in: {message}"
    return message


def summary(run: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return data


def manifest(path: Path, *clips: Path) -> Path:
    path.write_text("\n".join(["path,label", *(f"{clip},x" for clip in clips)]) + "\n")
    return path


# --- audio ---


def noise(samples: int, channels: int = 1, seed: int = 0) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal((samples, channels)).astype(np.float32)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_bad(folder: Path) -> dict[str, str]:
    """Write files that cannot be used and return what is said of each."""
    folder.mkdir()
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("These are words, and no sound. " * 50)
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    for name in ("cut.wav", "cut.flac", "cut.ogg"):
        soundfile.write(folder / name, noise(16000), 16000)
        halved(folder / name)
    soundfile.write(folder / "none.wav", noise(0), 16000)
    spoilt = noise(16000)
    spoilt[100:200] = np.nan
    soundfile.write(folder / "nan.wav", spoilt, 16000, subtype="FLOAT")
    soundfile.write(folder / "one.wav", noise(1), 16000)
    return {
        "empty.wav": "empty",
        "text.wav": "not readable as audio",
        "folder.wav": "not a regular file",
        "pipe.wav": "not a regular file",
        "cut.wav": "truncated",
        "cut.flac": "cannot be decoded",
        "cut.ogg": "truncated",
        "none.wav": "no samples",
        "nan.wav": "NaN",
        "one.wav": "too short",
        "absent.wav": "no such file",
    }


def make_odd(folder: Path) -> dict[str, str]:
    """Write files that can be used and are worth a note."""
    folder.mkdir()
    soundfile.write(folder / "silent.wav", 0 * noise(16000), 16000)
    soundfile.write(folder / "stereo.wav", noise(16000, 2), 16000)
    soundfile.write(folder / "high.wav", noise(192000), 192000)
    soundfile.write(folder / "misnamed.flac", noise(16000), 16000, format="WAV")
    return {
        "silent.wav": "silent",
        "stereo.wav": "more than one channel",
        "high.wav": "over 48000 Hz",
        "misnamed.flac": "of another format than its name says",
    }


def test_bad_clips_are_named_once_counted_and_replaced(cli: Cli, tmp_path: Path, good: Path) -> None:
    bad, odd = make_bad(tmp_path / "bad"), make_odd(tmp_path / "odd")
    paths = {tmp_path / "bad" / name: reason for name, reason in bad.items()}
    notes = {tmp_path / "odd" / name: note for name, note in odd.items()}
    data = manifest(tmp_path / "clips.csv", *sorted(good.iterdir()), *paths, *notes)
    run = tmp_path / "run"
    # two epochs: every clip is met
    done = cli(*SMALL, "--data", data, "--steps", "14", "--train.validation-clips", "4", "--out", run)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {Path(clip["path"]): clip for clip in summary(run)["bad_clips"]}
    assert found.keys() == paths.keys() and len(summary(run)["bad_clips"]) == len(paths)
    for path, reason in paths.items():
        assert reason in found[path]["reason"] and "clips.csv line" in found[path]["where"]
        assert done.stdout.count(f"{path} (") == 1, done.stdout
    counts = summary(run)["clip_notes"]
    for path, note in notes.items():
        assert [count for text, count in counts.items() if note in text] == [1], counts
        assert done.stdout.count(f"{path} (") == 1, done.stdout
    assert f"{len(paths)}, left out or replaced" in done.stdout
    assert all(math.isfinite(row["loss"]) for row in runs.rows(run)) and len(runs.rows(run)) == 14


@pytest.mark.parametrize("kind", ["header", "samples"])
def test_too_many_bad_clips_end_the_run(cli: Cli, tmp_path: Path, good: Path, kind: str) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(12):
        if kind == "header":
            (bad / f"{i}.wav").write_text("no sound")
        else:
            soundfile.write(bad / f"{i}.wav", np.nan * noise(16000), 16000, subtype="FLOAT")
    data = manifest(tmp_path / "clips.csv", *sorted(good.iterdir()), *sorted(bad.iterdir()))
    arguments = (
        *SMALL,
        "--data",
        data,
        "--steps",
        "30",
        "--train.validation-clips",
        "0",
        "--out",
        tmp_path / "run",
    )
    message = refused(cli(*arguments), "clips cannot be used; at most 10", "clips.csv line")
    assert sum(f"{bad}/{i}.wav" in message for i in range(12)) == 3


def test_a_held_out_set_of_bad_clips_does_not_end_the_run(cli: Cli, tmp_path: Path, good: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    for i in range(3):
        soundfile.write(bad / f"{i}.wav", np.nan * noise(16000), 16000, subtype="FLOAT")
    data = manifest(tmp_path / "clips.csv", *sorted(good.iterdir())[:1], *sorted(bad.iterdir()))
    # the one of these seeds with which a bad clip is held out
    for seed in range(8):
        arguments = ["--data", data, "--seed", str(seed), "--train.validation-clips", "1", "--steps", "1"]
        done = cli(*SMALL, *arguments, "--out", tmp_path / f"run{seed}")
        assert done.returncode == 0, done.stdout + done.stderr
        if "stand in for those held out" in done.stdout:
            assert str(bad) in done.stdout
            return
    raise AssertionError("no seed held a bad clip out")


def write_long(path: Path, hours: float = 2.0, rate: int = 48000) -> int:
    """Write a sparse 16-bit WAV with a second of noise in every ten minutes; return its samples."""
    samples = int(hours * 3600 * rate)
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + 2 * samples, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", 2 * samples)  # fmt: skip
    with open(path, "wb") as file:
        file.write(header)
        for minute in range(0, int(60 * hours), 10):
            file.seek(44 + 2 * 60 * rate * minute)
            file.write((8000 * noise(rate)).astype("<i2").tobytes())
        file.truncate(44 + 2 * samples)
    return samples


def peak_of_run(data: Path, out: Path, loader: str) -> int:
    """Return the most bytes resident in a run that ends well."""
    arguments = [
        *SMALL,
        "--data",
        data,
        "--steps",
        "4",
        "--out",
        out,
        "--loader",
        loader,
        "--data.clip-seconds",
        "2",
    ]
    process = runs.start(*arguments)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return int(2**30 * max(row["peak_memory_gib"] for row in runs.rows(out)))


@pytest.mark.parametrize(
    "loader",
    [
        "soundfile",
        pytest.param("dali", marks=[pytest.mark.dali, pytest.mark.slow(covers=["masktrain/data"])]),
    ],
)
def test_a_long_recording_costs_one_crop(tmp_path: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    # clips of the crop's length: the two runs differ in the size of a file and in nothing else
    clips, with_long = tmp_path / "clips", tmp_path / "with"
    clips.mkdir()
    for i in range(16):
        soundfile.write(clips / f"{i:02d}.wav", noise(96000, seed=i), 48000)
    shutil.copytree(clips, with_long)
    soundfile.write(clips / "long.wav", noise(96000), 48000)
    samples = write_long(with_long / "long.wav")
    without = peak_of_run(clips, tmp_path / "run0", loader)
    within = peak_of_run(with_long, tmp_path / "run1", loader)
    assert within - without < 200 * 2**20
    for start in (0, samples // 2, samples - 480000):
        begin = time.perf_counter()
        crop = try_crop(Crop(str(with_long / "long.wav"), start, 480000, samples, 48000))
        assert time.perf_counter() - begin < 1
        assert isinstance(crop, Decoded) and len(crop.samples) == 480000


# --- manifests ---


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "empty"),
        ("pth,label\na.wav,x\n", "path"),
        ("path,label\na.wav,x,y\n", "line 2"),
        ('{"data": [{"wave": "a.wav"}]}', "wav"),
        ('{"data": [{"wav": 3}]}', "entry 1"),
        ('{"data": ', "JSON"),
        ("\x00\x01\x02", "clips.csv"),
        ("path\tnum_samples\tsample_rate_hz\na.wav\tmany\t16000\n", "many"),
        ("path\tnum_samples\tsample_rate_hz\na.wav\t-4\t16000\n", "-4"),
        ("path,label\nnowhere.wav,x\n", "nowhere.wav"),
    ],
    ids=["empty", "column", "cells", "key", "number", "json", "binary", "samples", "negative", "absent"],
)
def test_a_manifest_that_is_wrong(cli: Cli, tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "clips.csv").write_text(content)
    run = tmp_path / "run"
    refused(cli(*SMALL, "--data", tmp_path / "clips.csv", "--steps", "3", "--out", run), named)
    assert not run.exists()  # a run that never began leaves no folder


def test_clips_named_twice_are_taken_once(cli: Cli, tmp_path: Path, good: Path) -> None:
    clips = sorted(good.iterdir())[:12]
    data = manifest(tmp_path / "clips.csv", *clips, clips[3], clips[5])
    arguments = ["--data", data, "--data", clips[0], "--steps", "1", "--out", tmp_path / "run"]
    done = cli(*SMALL, *arguments)
    assert done.returncode == 0, done.stderr
    assert "3 entries name a file once more" in done.stdout and str(clips[3]) in done.stdout
    assert "12 clips" in done.stdout


# --- the folder of the run ---


@pytest.fixture(scope="module")
def finished(cli: Cli, tmp_path_factory: pytest.TempPathFactory, good: Path) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = cli(*SMALL, "--data", good, "--steps", "6", "--checkpoint-every", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_out_that_cannot_be_used(cli: Cli, tmp_path: Path, good: Path, run: Path) -> None:
    before = sorted(p for p in run.rglob("*"))
    begin = [*SMALL, "--data", good, "--steps", "3", "--out"]
    refused(cli(*begin, run), run, "--resume", "another --out")
    assert sorted(p for p in run.rglob("*")) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear Sir")
    refused(cli(*begin, tmp_path / "full"), "letter.txt", "empty folder")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["letter.txt"]
    refused(cli(*begin, tmp_path / "full" / "letter.txt" / "run"), "letter.txt is a file")
    refused(cli(*begin, tmp_path / ("long" * 80)), "name is too long")
    refused(cli(*begin, "/proc/run"), "/proc/run")


def test_out_on_a_read_only_disk(cli: Cli, mounted: Callable[..., Path], good: Path) -> None:
    place = mounted("ro")
    refused(cli(*SMALL, "--data", good, "--steps", "3", "--out", place / "run"), "cannot be written", place)


def test_out_on_a_full_disk(cli: Cli, mounted: Callable[..., Path], good: Path) -> None:
    place = mounted("size=4k")
    (place / "filler").write_bytes(bytes(4096))
    refused(cli(*SMALL, "--data", good, "--steps", "3", "--out", place / "run"), "no space is left", place)


def test_a_disk_that_fills_up_while_training(
    cli: Cli, mounted: Callable[..., Path], tmp_path: Path, good: Path
) -> None:
    arguments = [*SMALL, "--data", good, "--steps", "8", "--checkpoint-every", "1", "--train.keep-last", "9"]
    assert cli(*arguments, "--out", tmp_path / "undisturbed").returncode == 0
    place = mounted("size=3m")
    message = refused(cli(*arguments, "--out", place / "run"), "no space is left", "--resume")
    assert str(place) in message
    done_before = len(runs.rows(place / "run"))
    assert 1 <= done_before < 8
    subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
    done = cli("run", "--resume", place / "run")
    assert done.returncode == 0, done.stderr
    assert runs.trace(place / "run") == runs.trace(tmp_path / "undisturbed")
    assert runs.tensors(place / "run") == runs.tensors(tmp_path / "undisturbed")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow over `size` bytes: what a full disk does, without one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_files_that_cannot_be_finished(cli: Cli, tmp_path: Path, good: Path, finished: Path) -> None:
    arguments = [*SMALL, "--data", good, "--steps", "6", "--checkpoint-every", "2"]
    with file_size_limit(1000):
        refused(cli(*arguments, "--out", tmp_path / "small"), "config.json", "could not be written")
    assert not (tmp_path / "small").exists()
    with file_size_limit(150_000):
        refused(cli(*arguments, "--out", tmp_path / "run"), "the checkpoint of step 2", "limit on file sizes")
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))
    done = cli("run", "--resume", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert runs.trace(tmp_path / "run") == runs.trace(finished)


def test_a_run_that_another_process_writes(cli: Cli, tmp_path: Path, good: Path) -> None:
    out = tmp_path / "run"
    arguments = [*SMALL, "--data", good, "--steps", "100000", "--checkpoint-every", "2", "--out", out]
    other = runs.start(*arguments)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not list(out.glob("checkpoints/step_*")):
            time.sleep(0.05)
        refused(cli("run", "--resume", out), f"process {other.pid}", "is writing this run now")
        refused(cli(*arguments), out, "--resume")
        assert other.poll() is None
    finally:
        other.kill()
        other.communicate()


# --- checkpoints ---


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def bomb(marker: Path) -> bytes:
    data = pickle.dumps(Marker(marker))
    probe = marker.with_name("probe")
    pickle.loads(pickle.dumps(Marker(probe)))
    assert probe.exists()  # such a pickle does run
    probe.rmdir()
    return data


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def keep_newest(run: Path) -> Path:
    for older in sorted((run / "checkpoints").glob("step_*"))[:-1]:
        shutil.rmtree(older)
    return newest(run)


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "flipped", "pickle"])
def test_a_damaged_checkpoint_is_refused(
    cli: Cli, tmp_path: Path, run: Path, good: Path, name: str, damage: str
) -> None:
    path = keep_newest(run) / name
    marker = tmp_path / "marker"
    if damage == "absent":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        halved(path)
    elif damage == "flipped":
        flip(path, 0.6)
    else:
        path.write_bytes(bomb(marker))
    refused(cli("run", "--resume", run), name, "no valid checkpoint")
    begin = [*SMALL, "--data", good, "--steps", "3", "--out", tmp_path / "new", "--init-from"]
    refused(cli(*begin, run), name)
    refused(cli(*begin, path.parent), name)
    assert not marker.exists() and not (tmp_path / "new").exists()


def test_the_checkpoint_before_a_damaged_one_serves(cli: Cli, run: Path, finished: Path) -> None:
    flip(newest(run) / "model.safetensors", 0.9)
    done = cli("run", "--resume", run)
    assert done.returncode == 0, done.stderr
    assert (
        "passed over" in done.stdout and "step_00000006" in done.stdout and "Resumed at step 4" in done.stdout
    )
    assert runs.trace(run) == runs.trace(finished) and runs.tensors(run) == runs.tensors(finished)


def test_init_from_something_else(cli: Cli, tmp_path: Path, good: Path, run: Path) -> None:
    begin = [*SMALL, "--data", good, "--steps", "3", "--out", tmp_path / "new", "--init-from"]
    refused(cli(*begin, tmp_path / "nowhere"), "nowhere", "no such folder")
    (tmp_path / "weights.pt").write_bytes(bomb(tmp_path / "marker"))
    refused(cli(*begin, tmp_path / "weights.pt"), "weights.pt")
    (tmp_path / "none").mkdir()
    refused(cli(*begin, tmp_path / "none"), "none")
    shutil.rmtree(run / "checkpoints")
    refused(cli(*begin, run), run)
    assert not (tmp_path / "marker").exists() and not (tmp_path / "new").exists()


def test_a_checkpoint_of_another_recipe(cli: Cli, tmp_path: Path, good: Path, run: Path) -> None:
    other = tmp_path / "other"
    arguments = [a if a != "mae_ast_frame" else "mae_ast_patch" for a in SMALL]
    assert cli(*arguments, "--data", good, "--steps", "6", "--out", other).returncode == 0
    begin = [*SMALL, "--data", good, "--steps", "3", "--out", tmp_path / "new"]
    # its shapes are the same, its tokens are not
    refused(
        cli(*begin, "--init-from", other),
        "mae_ast_patch",
        "tokens.patch_time: the weights have 16, this run 2",
    )
    refused(
        cli(*begin, "--init-from", run, "--model.embed-dim", "48"), "--init-from", "do not fit this model"
    )
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(other / "checkpoints", run / "checkpoints")
    refused(cli("run", "--resume", run), "mae_ast_patch", "mae_ast_frame", "--init-from")


def test_init_from_takes_the_weights(cli: Cli, tmp_path: Path, good: Path, run: Path) -> None:
    out = tmp_path / "new"
    done = cli(
        *SMALL, "--data", good, "--steps", "1", "--optim.lr", "1e-30", "--init-from", run, "--out", out
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = runs.tensors(out), runs.tensors(run)
    names = [name for name in ours if name.endswith("weight") and name.startswith("model/")]
    assert names and all(ours[name] == theirs[name] for name in names)


# --- the other files of a run ---


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: text.replace('"run"', '"walk"'),
        lambda text: text.replace('"mask_ratio"', '"mask_ration"'),
        lambda text: text.replace('"mask_ratio": 0.75', '"mask_ratio": "much"'),
        lambda text: text.replace('"mask_ratio": 0.75', '"mask_ratio": 7'),
        lambda text: text.replace('"mask_ratio": 0.75', '"mask_ratio": 1' + "0" * 400),
        lambda text: text.replace('"mask_ratio": 0.75', '"mask_ratio": NaN'),
        lambda text: text.replace('"data": [', '"data": [3, '),
        lambda text: text.replace('"device": "cpu"', '"device": "abacus"'),
        lambda text: "[" * 100_000,
        lambda text: "\udcff\udcfe",
    ],
    ids=[
        "empty",
        "cut",
        "list",
        "no-run",
        "unknown-field",
        "type",
        "range",
        "huge",
        "nan",
        "data",
        "device",
        "nested",
        "bytes",
    ],
)
def test_a_damaged_config(cli: Cli, run: Path, damage: Callable[[str], str]) -> None:
    path = run / "config.json"
    text = path.read_text()
    damaged = damage(text)
    assert damaged != text
    path.write_bytes(damaged.encode(errors="surrogateescape"))
    refused(cli("run", "--resume", run))


def test_other_clips_than_the_run_began_with(cli: Cli, run: Path) -> None:
    text = (run / "config.json").read_text()
    stored = json.loads(text)
    stored["run"]["manifest_digest"] = "0" * 64
    (run / "config.json").write_text(json.dumps(stored))
    refused(cli("run", "--resume", run), "clips are not those")


@pytest.mark.parametrize("name", ["metrics.jsonl", "validation.jsonl", "env.json", "summary.json"])
@pytest.mark.parametrize("content", ["pickle", "cut", "rows", "folder"])
def test_a_damaged_record_is_named_and_stops_nothing(
    cli: Cli, tmp_path: Path, run: Path, name: str, content: str
) -> None:
    path, marker = run / name, tmp_path / "marker"
    if content == "pickle":
        path.write_bytes(bomb(marker))
    elif content == "cut":
        halved(path)
    elif content == "rows":
        path.write_text(
            '{"step": 1}\n{"step": 2, "loss": "high", "elapsed_s": [], "parts": 3}\n{"step": true}\n[]\n'
        )
    else:
        path.unlink()
        path.mkdir()
    # the last checkpoint is gone: the run has something left to do, and to record
    shutil.rmtree(newest(run))
    done = cli("run", "--resume", run)
    if content == "folder":
        refused(done, name)
    else:
        assert done.returncode == 0, done.stderr
        assert runs.rows(run)[-1]["step"] == 6 and summary(run)["complete"]
        if name.endswith("jsonl"):
            assert f"{name}: " in done.stdout and "damaged" in done.stdout
    assert not marker.exists()


def test_resume_where_there_is_no_run(cli: Cli, tmp_path: Path) -> None:
    refused(cli("run", "--resume", tmp_path / "nowhere"), "nowhere", "no such folder")
    refused(cli("run", "--resume", tmp_path), "holds no config.json")
    (tmp_path / "file").write_text("")
    refused(cli("run", "--resume", tmp_path / "file"), "file")


# --- what surrounds a run ---


def test_json_that_cannot_be_written_is_refused_before_the_work(cli: Cli, tmp_path: Path, good: Path) -> None:
    run = tmp_path / "run"
    begin = [*SMALL, "--data", good, "--steps", "3", "--out", run, "--json"]
    refused(cli(*begin, tmp_path / "nowhere" / "report.json"), "--json", "nowhere")
    refused(cli(*begin, tmp_path), "--json", "folder")
    refused(cli("recipes", "list", "--json", "/proc/report.json"), "--json", "/proc/report.json")
    assert not run.exists()


def test_more_memory_than_there_is(cli: Cli, tmp_path: Path, good: Path) -> None:
    arguments = ["--model.embed-dim", str(2**45), "--data", good, "--steps", "1", "--out", tmp_path / "run"]
    refused(cli(*SMALL, *arguments), "Not enough memory", "--batch-size")


def test_output_that_nobody_reads() -> None:
    for command in ("recipes list", "run --help"):
        pipe = subprocess.Popen(
            [*runs.COMMAND, *command.split()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=runs.environment(),
        )
        assert pipe.stdout is not None and pipe.stderr is not None
        pipe.stdout.close()  # before it has written anything
        errors = pipe.stderr.read().decode()
        assert pipe.wait(timeout=60) in (0, 141) and errors == "", errors


def test_any_encoding_of_the_output_serves(tmp_path: Path, good: Path) -> None:
    odd = tmp_path / "Kläng\udcff"
    shutil.copytree(good, odd)
    environment = {**runs.environment(), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    command = [*runs.COMMAND, *SMALL, "--data", odd, "--steps", "1", "--out", tmp_path / "Läuf\udcfe"]
    done = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "Läuf\udcfe" / "summary.json").exists()
