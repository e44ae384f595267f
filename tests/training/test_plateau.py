# SPDX-License-Identifier: Apache-2.0
"""The plateau schedule: torch's rule, the rate that a run really takes, and the same after a kill and on two ranks."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.errors import ConfigError
from masktrain.training import checkpoint
from masktrain.training.schedule import Plateau, ScheduleConfig, resolve

SSAST = ScheduleConfig(kind="plateau", warmup_steps=1000, total_steps=800_000, evaluate_every=4000)


def torch_rates(losses: list[float], factor: float, patience: int) -> list[float]:
    """The rate after each evaluation of torch's scheduler, peak 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience, eps=0.0
    )
    rates = []
    for loss in losses:
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


LOSSES = st.one_of(
    st.sampled_from([1.0, 0.99995, 0.9999, 0.99989, 0.5, math.nan, math.inf]), st.floats(0.0, 2.0)
)


@settings(deadline=None)
@given(losses=st.lists(LOSSES, max_size=40), factor=st.floats(0.1, 0.9), patience=st.integers(0, 3))
def test_the_rule_is_torchs_also_across_a_restart(losses: list[float], factor: float, patience: int) -> None:
    config = ScheduleConfig(
        kind="plateau", warmup_steps=0, total_steps=10, evaluate_every=1, factor=factor, patience=patience
    )
    plateau = Plateau(config)
    for loss, rate in zip(losses, torch_rates(losses, factor, patience), strict=True):
        before = plateau.reduction
        assert plateau.watch(loss) == (plateau.reduction < before)
        assert plateau.reduction == rate
        again = Plateau(config)
        again.load_state(json.loads(json.dumps(plateau.state())))
        plateau = again


def test_patience_two_acts_on_the_third_bad_evaluation() -> None:
    plateau = Plateau(SSAST)
    assert [plateau.watch(loss) for loss in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)] == [
        False, False, False, True, False, False, True,
    ]  # fmt: skip
    assert plateau.reduction == 0.25


@pytest.mark.parametrize("state", [{}, {"best": 1, "bad": 0, "reduction": 1.0}, {"best": None, "bad": True}])
def test_a_state_of_another_form_is_refused(state: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError)):
        Plateau(SSAST).load_state(state)


def test_rates_and_horizons() -> None:
    full = resolve(SSAST, 800_000, 1e-4)
    assert (full.warmup, full.evaluate_every) == (1000, 4000)
    assert full.lr_at(499) == pytest.approx(1e-4 * 500 / 1001)
    assert full.lr_at(1000) == full.lr_at(799_999) == 1e-4
    assert full.lr_at(20_000, 0.25) == 2.5e-5
    assert full.lr_at(499, 0.25) == full.lr_at(499)  # the warm-up is as published
    short = resolve(SSAST, 80_000, 1e-4)
    assert (short.warmup, short.evaluate_every) == (100, 400)
    text = "\n".join(short.describe())
    assert "warm-up 1000 -> 100 steps, evaluations every 4000 -> 400 steps" in text
    assert "times 0.5" in text and "more than 2 evaluations" in text
    assert resolve(SSAST, 160, 1e-4).evaluate_every == 20  # not 1: see LEAST_INTERVAL
    often = ScheduleConfig(kind="plateau", warmup_steps=0, total_steps=1000, evaluate_every=5)
    assert [resolve(often, steps, 1.0).evaluate_every for steps in (100, 1000, 10_000)] == [5, 5, 50]
    least = ScheduleConfig(
        kind="plateau", warmup_steps=0, total_steps=10, evaluate_every=1, min_lr=1e-5, scaling="absolute"
    )
    assert resolve(least, 20, 1e-4).lr_at(15, 2.0**-10) == 1e-5  # longer than published: it does not end
    assert [done for done in range(11) if resolve(SSAST, 10, 1.0).milestone(done)] == [0, 5, 10]
    assert not any(
        resolve(ScheduleConfig(kind="linear", warmup_steps=0, total_steps=9), 9, 1.0).watched(d)
        for d in range(10)
    )


@pytest.mark.parametrize(
    "fields",
    [{"evaluate_every": None}, {"evaluate_every": 0}, {"evaluate_every": 11}, {"factor": 1.0}, {"factor": 0.0}, {"patience": -1}],
    ids=str,
)  # fmt: skip
def test_wrong_options(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"schedule.{next(iter(fields))}"):
        ScheduleConfig(
            **{"kind": "plateau", "warmup_steps": 0, "total_steps": 10, "evaluate_every": 1, **fields}
        )


# --- whole runs ---

STEPS = 20
# a rate so large that the held-out loss stops improving, and is watched every second step
ARGUMENTS = [
    "run", "--recipe", "mae_ast_frame", *runs.SMALL, "--steps", str(STEPS), "--schedule.kind", "plateau",
    "--schedule.scaling", "absolute", "--schedule.warmup-steps", "2", "--schedule.evaluate-every", "2",
    "--schedule.patience", "1", "--optim.lr", "0.1", "--checkpoint-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_clips(tmp_path_factory.mktemp("audio"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    done = runs.masktrain(*ARGUMENTS, "--data", clips, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "has not improved in 2 evaluations" in done.stdout
    return out


def validations(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def plateau_state(run: Path) -> Any:
    saved = checkpoint.latest(run / "checkpoints").checkpoint
    assert saved is not None and saved.step == STEPS
    return saved.data["plateau"]


def test_the_rate_of_a_run_follows_its_held_out_loss(undisturbed: Path) -> None:
    rows = validations(undisturbed)
    assert [row["step"] for row in rows] == [0, *range(2, STEPS + 1, 2)]
    watched = [row["loss"] for row in rows[1:]]
    rates = [0.1 * rate for rate in torch_rates(watched, 0.5, 1)]
    assert len(set(rates)) >= 3  # the rate came down at least twice
    expected = [0.1 / 3, 0.2 / 3]
    for rate in [0.1, *rates[1:-1]]:
        expected += [rate, rate]
    assert [row["lr"] for row in runs.rows(undisturbed)] == pytest.approx(expected, rel=1e-12)
    assert plateau_state(undisturbed)["reduction"] == rates[-1] / 0.1


def test_killed_runs_continue_bit_for_bit(tmp_path: Path, clips: Path, undisturbed: Path) -> None:
    out = tmp_path / "run"
    arguments: list[Any] = [*ARGUMENTS, "--data", clips, "--out", out]
    for step in (4, 10):
        process = runs.start(*arguments)
        wanted = out / "checkpoints" / f"step_{step:08d}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and not wanted.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert wanted.exists()
        arguments = ["run", "--resume", out]
    done = runs.masktrain(*arguments)
    assert done.returncode == 0, done.stderr
    assert runs.trace(out) == runs.trace(undisturbed)
    assert validations(out) == validations(undisturbed)
    assert plateau_state(out) == plateau_state(undisturbed)
    assert runs.tensors(out) == runs.tensors(undisturbed)


WORKER = """
import os, dataclasses
from masktrain.training import schedule, validation

rank = int(os.environ["RANK"])
evaluate, watch = validation.Validator.__call__, schedule.Plateau.watch

def off(self, done, *, draw=True):
    found, drawn = evaluate(self, done, draw=draw)
    return dataclasses.replace(found, loss=found.loss + rank * done), drawn

def recorded(self, loss):
    lowered = watch(self, loss)
    with open(os.environ["RECORD"] + str(rank), "a") as file:
        print(loss.hex(), self.reduction, file=file)
    return lowered

validation.Validator.__call__, schedule.Plateau.watch = off, recorded
from masktrain.cli import main
main()
"""


def test_ranks_take_the_first_ones_value(tmp_path: Path, clips: Path) -> None:
    """Also where another's differs, as it may on another device: all ranks keep one learning rate."""
    script, record = tmp_path / "main.py", tmp_path / "record"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [
        str(script),
        *ARGUMENTS,
        "--steps",
        "10",
        "--data",
        str(clips),
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**runs.environment(), "RECORD": str(record)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = ((tmp_path / f"record{rank}").read_text().split() for rank in (0, 1))
    assert first == second
    rows = {row["step"]: row["loss"] for row in validations(tmp_path / "run")}
    assert [float.fromhex(loss) for loss in first[::2]] == [rows[step] for step in (2, 4, 6, 8, 10)]
