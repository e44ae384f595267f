# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, or asked to stop, and resumed equals the undisturbed run bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import runs

STEPS = 24
ARGUMENTS = ["--recipe", "mae_ast_frame", *runs.SMALL, "--steps", str(STEPS), "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_clips(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = runs.masktrain("run", *ARGUMENTS, "--data", clips, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def newest(out: Path) -> str:
    """Return the name of the newest checkpoint, finished or under way."""
    return max((p.name.lstrip(".") for p in (out / "checkpoints").glob("*step_*")), default="")


def kill_until_done(clips: Path, out: Path, kills: int, seed: int) -> int:
    """Start the run, kill it `kills` times at random moments, resume it each time; return the kills that hit."""
    rng = random.Random(seed)
    hits = 0
    arguments = ["run", *ARGUMENTS, "--data", clips, "--out", out]
    for _ in range(kills):
        # wait for the next checkpoint to be under way: kills shall land in steps and in saves, not in start-up
        before = newest(out)
        process = runs.start(*arguments)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None and newest(out) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.35))
        process.send_signal(signal.SIGKILL)
        hits += process.wait() == -signal.SIGKILL
        process.communicate()
        # the number of workers is no part of the run
        arguments = ["run", "--resume", out, "--data.workers", str(rng.choice([1, 2, 3]))]
    done = runs.masktrain(*arguments)
    assert done.returncode == 0, done.stderr
    return hits


def assert_same(a: Path, b: Path) -> None:
    assert runs.trace(a) == runs.trace(b)
    assert [row[0] for row in runs.trace(a)] == list(range(1, STEPS + 1))
    ours, theirs = runs.tensors(a), runs.tensors(b)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] != theirs[name]]


def test_killed_runs_continue_bit_for_bit(tmp_path: Path, clips: Path, undisturbed: Path) -> None:
    hits = kill_until_done(clips, tmp_path / "run", kills=4, seed=1)
    assert hits >= 2
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.slow(covers=["masktrain/training", "masktrain/data", "kernels", "csrc"])
@pytest.mark.timeout(1800)
def test_fifty_kills(tmp_path: Path, clips: Path, undisturbed: Path) -> None:
    hits = sum(kill_until_done(clips, tmp_path / f"run{i}", kills=5, seed=10 + i) for i in range(10))
    assert hits >= 25
    for i in range(10):
        assert_same(tmp_path / f"run{i}", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_stop_request_saves_and_leaves(tmp_path: Path, clips: Path, undisturbed: Path, number: int) -> None:
    out = tmp_path / "run"
    process = runs.start("run", *ARGUMENTS, "--checkpoint-every", "1000", "--data", clips, "--out", out)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size
    ):
        time.sleep(0.01)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert "Traceback" not in stdout + stderr
    assert "--resume" in stdout
    stopped_at = runs.rows(out)[-1]["step"]
    assert 1 <= stopped_at < STEPS
    assert (out / "checkpoints" / f"step_{stopped_at:08d}").is_dir()
    done = runs.masktrain("run", "--resume", out)
    assert done.returncode == 0, done.stderr
    assert runs.trace(out) == runs.trace(undisturbed)
    assert [k for k, v in runs.tensors(out).items() if v != runs.tensors(undisturbed)[k]] == []


def test_resume_refuses_differences(undisturbed: Path) -> None:
    done = runs.masktrain("run", "--resume", undisturbed, "--masking.mask-ratio", "0.5", "--seed", "7")
    assert done.returncode == 2
    assert "masking.mask_ratio" in done.stderr and "seed" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_resumes_to_nothing(undisturbed: Path) -> None:
    before = runs.trace(undisturbed)
    done = runs.masktrain("run", "--resume", undisturbed)
    assert done.returncode == 0, done.stderr
    assert runs.trace(undisturbed) == before


def test_changed_clips_are_named(tmp_path: Path) -> None:
    clips = runs.make_clips(tmp_path / "audio", 24)
    out = tmp_path / "run"
    arguments = [
        "run",
        "--recipe",
        "mae_ast_frame",
        *runs.SMALL,
        "--steps",
        "2",
        "--data",
        clips,
        "--out",
        out,
    ]
    assert runs.masktrain(*arguments).returncode == 0
    (clips / "clip000.flac").unlink()
    done = runs.masktrain("run", "--resume", out)
    assert done.returncode == 2
    assert "clips are not those" in done.stderr
