# SPDX-License-Identifier: Apache-2.0
"""Folders that hold something, cannot be made or are in use; files that are whole or not there."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from datetime import datetime
from importlib import metadata
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import torch

import masktrain
from masktrain.errors import ConfigError, RunError
from masktrain.kernels._dispatch import Choice
from masktrain.training import run_dir
from masktrain.training.run_dir import RunDir, cpu_model, default_out, environment, git_commit, write_json


def make_run(path: Path) -> None:
    with RunDir.create(path) as run:
        run.write_config({"masktrain": "0.1.0", "recipe": {"name": "x"}})


def test_a_new_run_and_its_files(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with RunDir.create(path) as run:
        run.write_config({"recipe": {"lr": 1e-3}})
        run.write_summary({"loss": math.nan, "validation": [{"loss": math.inf}], "steps": 3})
        assert run.note is None
    assert json.loads((path / "config.json").read_text()) == {"recipe": {"lr": 1e-3}}
    refuse = {"parse_constant": lambda word: pytest.fail(f"{word} is not JSON")}
    assert json.loads((path / "summary.json").read_text(), **refuse) == {
        "loss": None,
        "validation": [{"loss": None, "nonfinite": {"loss": "inf"}}],
        "steps": 3,
        "nonfinite": {"loss": "nan"},
    }
    assert sorted(entry.name for entry in path.iterdir()) == [".lock", "config.json", "summary.json"]


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(ConfigError) as caught:
        RunDir.create(tmp_path)
    assert f"--resume {tmp_path}" in str(caught.value) and "another --out" in str(caught.value)
    RunDir.reopen(tmp_path).close()


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    for name in ("b.wav", "a.wav", "c.wav", "d.wav"):
        (tmp_path / name).write_text("x")
    with pytest.raises(ConfigError, match=r"holds no run \(a\.wav, b\.wav, c\.wav and 1 more\)"):
        RunDir.create(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        RunDir.reopen(tmp_path)


def test_a_start_that_died_before_its_config_leaves_the_folder_usable(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run").close()
    make_run(tmp_path / "run")


@pytest.mark.parametrize("make", [RunDir.create, RunDir.reopen])
def test_a_file_in_the_way(tmp_path: Path, make: object) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run" / "deeper"):
        with pytest.raises(ConfigError, match=r"is a file, not a folder|no such folder"):
            make(path)  # type: ignore[operator]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name is too long"):
        RunDir.create(tmp_path / ("x" * 300))
    if sys.platform == "linux":
        with pytest.raises(ConfigError, match=r"cannot be (made|written)"):
            RunDir.create(Path("/proc/masktrain/run"))
    with pytest.raises(ConfigError, match="no such folder"):
        RunDir.reopen(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EROFS, "Make it writable"),
        (errno.ENOSPC, "no space is left"),
        (errno.EACCES, "cannot be written"),
    ],
)
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, said: str
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    make_run(tmp_path)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=said):
        RunDir.reopen(tmp_path)


# forked, not started anew: a child needs no second import of torch
FORK = multiprocessing.get_context("fork")


def hold(path: Path, ready: Connection) -> None:
    """Start a run, leave a worker behind that outlives this process, and say so."""
    os.setsid()
    run = RunDir.create(path)
    run.write_config({"recipe": {}})
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    ready.send("held")
    time.sleep(60)


def test_two_processes_never_write_one_run_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "run"
    here, there = FORK.Pipe()
    process = FORK.Process(target=hold, args=(path, there))
    process.start()
    assert process.pid is not None
    try:
        assert here.poll(30) and here.recv() == "held"
        with pytest.raises(ConfigError, match=rf"process {process.pid} on .* is writing this run now"):
            RunDir.reopen(path)
        process.kill()
        process.join()
        RunDir.reopen(path).close()
    finally:
        os.killpg(process.pid, signal.SIGKILL)


def test_one_process_opens_a_run_once(tmp_path: Path) -> None:
    make_run(tmp_path)
    with RunDir.reopen(tmp_path), pytest.raises(ConfigError, match="already writes a run there"):
        RunDir.reopen(tmp_path / "." / "")
    RunDir.reopen(tmp_path).close()


def start(path: Path, together: Barrier, answer: Connection) -> None:
    together.wait()
    try:
        run = RunDir.create(path)
    except ConfigError:
        answer.send("refused")
        return
    run.write_config({})
    time.sleep(0.2)
    run.close()
    answer.send("ran")


@pytest.mark.parametrize("_", range(3))
def test_starts_at_once_end_in_one_run(tmp_path: Path, _: int) -> None:
    together = FORK.Barrier(4)
    pipes = [FORK.Pipe() for _ in range(4)]
    processes = [FORK.Process(target=start, args=(tmp_path / "run", together, pipe[1])) for pipe in pipes]
    for process in processes:
        process.start()
    answers = [here.recv() for here, _ in pipes if here.poll(30)]
    for process in processes:
        process.join()
    assert sorted(answers) == ["ran", "refused", "refused", "refused"]


def test_a_run_that_began_and_ended_before_the_lock_was_taken_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_run_first(*_: object) -> None:
        (tmp_path / "config.json").write_text("{}")

    monkeypatch.setattr(fcntl, "lockf", other_run_first)
    with pytest.raises(ConfigError, match="holds another run"):
        RunDir.create(tmp_path)
    assert not run_dir._held


def test_a_file_system_without_locks_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with RunDir.create(tmp_path / "run") as run:
        assert run.note is not None and "has no locks" in run.note


def write_beyond_the_limit(path: Path, answer: Connection) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        write_json(path, {"text": "x" * 5000})
    except RunError as error:
        answer.send(str(error))


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"steps": 1})
    here, there = FORK.Pipe()
    process = FORK.Process(target=write_beyond_the_limit, args=(path, there))
    process.start()
    assert here.poll(30) and "summary.json could not be written" in here.recv()
    process.join()
    assert json.loads(path.read_text()) == {"steps": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
    with pytest.raises(RunError, match="could not be written"):
        write_json(path / "below" / "x.json", {})


def test_env_says_what_serves_and_keeps_what_earlier_starts_said(tmp_path: Path) -> None:
    choice = Choice(
        "mask_gather", "reference", lambda: None, (("triton", "no CUDA device"), ("native", "not built"))
    )
    env = environment(torch.device("cpu"), [choice], world_size=2)
    with RunDir.create(tmp_path / "run") as run:
        run.write_env(env)
        run.write_env({**env, "threads": 99})
        found = json.loads(run.env.read_text())
        run.env.write_text("[1]")
        run.write_env(env)
        assert json.loads(run.env.read_text())["ranks"] == 2
    assert found["threads"] == 99 and [before["threads"] for before in found["before"]] == [
        torch.get_num_threads()
    ]
    assert found["kernels"] == {
        "mask_gather": {
            "serves": "reference",
            "passed_over": {"triton": "no CUDA device", "native": "not built"},
        }
    }
    assert found["python"] == platform.python_version()
    assert found["masktrain"] == masktrain.__version__
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["device"] == {"type": "cpu"}
    assert datetime.fromisoformat(found["started"]).tzinfo is not None


def test_the_environment_imports_none_of_the_packages_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "soundfile", "tensorboard", "matplotlib", "safetensors", "nvidia"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    packages = environment(torch.device("cpu"), [])["packages"]
    assert packages["soundfile"] == metadata.version("soundfile")


def test_the_cpu_is_named(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nvendor_id\t: Maker\nmodel name\t: Maker Fast(R) 9000 @ 2.5GHz\n")
    assert cpu_model(info) == "Maker Fast(R) 9000 @ 2.5GHz"
    assert cpu_model(tmp_path / "nothing") in (platform.processor(), platform.machine())


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *name, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_commit_is_that_of_our_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "masktrain"
    package.mkdir()
    assert git_commit(package) is None
    (package / "a.py").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_commit(package) == commit
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert git_commit(package) == commit
    monkeypatch.delenv("GIT_DIR")
    (package / "a.py").write_text("2")
    assert git_commit(package) == f"{commit}-dirty"
    # installed into an environment that lies in the checkout of another project
    installed = tmp_path / "venv" / "site-packages" / "masktrain"
    installed.mkdir(parents=True)
    assert git_commit(installed) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit(package) is None


def test_default_names_do_not_collide(tmp_path: Path) -> None:
    now = datetime(2025, 3, 4, 5, 6, 7)
    first = default_out("mae_ast_frame", now, tmp_path)
    assert first == tmp_path / "mae_ast_frame_2025-03-04_05-06-07"
    make_run(first)
    second = default_out("mae_ast_frame", now, tmp_path)
    assert second.name == "mae_ast_frame_2025-03-04_05-06-07_2"
    RunDir.create(second).close()
    assert default_out("m2d", now) == Path("runs/m2d_2025-03-04_05-06-07")


def test_nothing_is_held_after_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(ConfigError):
        RunDir.create(tmp_path)
    assert not run_dir._held
