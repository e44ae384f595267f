# SPDX-License-Identifier: Apache-2.0
"""The schedule against its closed form in exact fractions, fairseq's rule, and the scaling of horizons."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from masktrain.errors import ConfigError
from masktrain.training.schedule import ScheduleConfig, resolve, scale_horizon

MAE_AST = ScheduleConfig(kind="linear", warmup_steps=32_000, total_steps=550_000)


@given(steps=st.integers(1, 300), total=st.integers(1, 10**6), share=st.floats(0, 1), lr=st.floats(1e-6, 10))
def test_linear_closed_form(steps: int, total: int, share: float, lr: float) -> None:
    config = ScheduleConfig(kind="linear", warmup_steps=int(share * total), total_steps=total)
    schedule = resolve(config, steps, lr)
    warmup = schedule.warmup
    for step in range(steps):
        if step < warmup:
            truth = Fraction(lr) * Fraction(step + 1, warmup + 1)
        else:
            truth = Fraction(lr) * Fraction(steps - step, steps - warmup)
        assert schedule.lr_at(step) == pytest.approx(float(truth), rel=1e-15)
        assert schedule.lr_at(step) > 0


@given(
    steps=st.integers(2, 300),
    total=st.integers(1, 10**6),
    share=st.floats(0, 1),
    lr=st.floats(1e-4, 10),
    floor=st.floats(0, 1),
)
def test_cosine_closed_form(steps: int, total: int, share: float, lr: float, floor: float) -> None:
    config = ScheduleConfig(
        kind="cosine", warmup_steps=int(share * total), total_steps=total, min_lr=floor * lr
    )
    schedule = resolve(config, steps, lr)
    for step in range(schedule.warmup, steps):
        x = (step - schedule.warmup) / (steps - schedule.warmup)
        truth = config.min_lr + (lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * x))
        assert schedule.lr_at(step) == pytest.approx(truth, rel=1e-9, abs=1e-15 * lr)
        assert schedule.lr_at(step) > 0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@given(steps=st.integers(2, 2000), total=st.integers(1, 10**6), share=st.floats(0, 1))
def test_rises_to_one_peak_and_falls(kind: Any, steps: int, total: int, share: float) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=int(share * total), total_steps=total)
    schedule = resolve(config, steps, 0.1)
    rates = [schedule.lr_at(step) for step in range(steps)]
    top = min(schedule.warmup, steps - 1)
    assert all(a < b for a, b in pairwise(rates[: top + 1]))
    assert all(a > b for a, b in pairwise(rates[top:]))
    if schedule.warmup < steps:
        assert rates[schedule.warmup] == 0.1


def test_the_last_update_of_a_long_cosine_is_not_lost_in_rounding() -> None:
    schedule = resolve(ScheduleConfig(kind="cosine", warmup_steps=0, total_steps=10**8), 10**8, 1.0)
    assert schedule.lr_at(10**8 - 1) == pytest.approx((math.pi / 2e8) ** 2, rel=1e-9)


def fairseq_polynomial(updates: int, lr: float, warmup: int, total: int) -> float:
    """fairseq's learning rate after `updates` updates, power 1, end 0 (polynomial_decay_schedule.py)."""
    if warmup > 0 and updates <= warmup:
        return lr * updates / warmup
    if updates >= total:
        return 0.0
    return lr * (1 - (updates - warmup) / (total - warmup))


def test_against_fairseq() -> None:
    """The same peak and decay; in the warm-up at most 1 / (warm-up + 1) of the peak above, and never 0."""
    schedule = resolve(MAE_AST, 550_000, 1e-4)
    for step in [0, 1, 100, 31_999, 32_000, 32_001, 300_000, 549_999]:
        theirs = fairseq_polynomial(step, 1e-4, 32_000, 550_000)
        if step >= 32_000:
            assert schedule.lr_at(step) == pytest.approx(theirs, rel=1e-10)
        else:
            assert 0 < schedule.lr_at(step) - theirs <= 1e-4 / 32_001 * (1 + 1e-9)
    assert fairseq_polynomial(0, 1e-4, 32_000, 550_000) == 0 < schedule.lr_at(0)


@settings(max_examples=200)
@given(count=st.integers(0, 10**6), total=st.integers(1, 10**6), steps=st.integers(1, 10**7))
def test_horizons_keep_their_share(count: int, total: int, steps: int) -> None:
    assume(count <= total)
    scaled = scale_horizon(count, total, steps)
    share = Fraction(count * steps, total)
    assert abs(scaled - share) <= Fraction(1, 2) or scaled == 1
    assert (scaled == 0) == (count == 0) and scaled <= steps
    assert scale_horizon(count, total, total) == count


def test_a_short_run_keeps_the_shape() -> None:
    """Without scaling, 60 steps of a warm-up of 32000 would end at 0.2 % of the learning rate."""
    schedule = resolve(MAE_AST, 60, 1e-3)
    assert (schedule.warmup, schedule.horizon) == (3, 60)
    assert max(schedule.lr_at(step) for step in range(60)) == 1e-3
    lines = "\n".join(schedule.describe())
    for part in ("550000 -> 60 steps", "32000 -> 3 steps", "0.001", "linear"):
        assert part in lines
    assert "warning" not in lines


def test_absolute_keeps_the_counts_and_warns() -> None:
    config = ScheduleConfig(kind="linear", warmup_steps=32_000, total_steps=550_000, scaling="absolute")
    schedule = resolve(config, 60, 1e-3)
    assert (schedule.warmup, schedule.horizon, schedule.steps) == (32_000, 550_000, 60)
    full = resolve(MAE_AST, 550_000, 1e-3)
    assert [schedule.lr_at(s) for s in range(60)] == [full.lr_at(s) for s in range(60)]
    lines = "\n".join(schedule.describe())
    assert "nothing is scaled" in lines and "warning" in lines and "1.87e-06 of 0.001" in lines
    with pytest.raises(ConfigError, match="550000"):
        resolve(config, 550_001, 1e-3)


def test_as_published_nothing_is_scaled() -> None:
    assert "nothing is scaled" in "\n".join(resolve(MAE_AST, 550_000, 1e-4).describe())


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_one_step(kind: Any) -> None:
    assert resolve(ScheduleConfig(kind=kind, warmup_steps=0, total_steps=10), 1, 0.5).lr_at(0) == 0.5
    assert resolve(ScheduleConfig(kind=kind, warmup_steps=1, total_steps=10), 1, 0.5).lr_at(0) == 0.25


@pytest.mark.parametrize("step", [-1, 60, 10**9])
def test_steps_outside_the_run(step: int) -> None:
    with pytest.raises(ValueError, match=r"\[0, 60\)"):
        resolve(MAE_AST, 60, 1e-3).lr_at(step)


WRONG: list[dict[str, Any]] = [
    {"warmup_steps": 0, "total_steps": 0},
    {"warmup_steps": -1, "total_steps": 10},
    {"warmup_steps": 11, "total_steps": 10},
    {"warmup_steps": 1, "total_steps": 10, "min_lr": 1e-5},
    {"warmup_steps": 1, "total_steps": 10, "kind": "cosine", "min_lr": -1e-5},
    {"warmup_steps": 1, "total_steps": 10, "kind": "cosine", "min_lr": math.nan},
]


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_wrong_options(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="schedule"):
        ScheduleConfig(**{"kind": "linear", **fields})


def test_wrong_runs() -> None:
    with pytest.raises(ConfigError, match="--steps"):
        resolve(MAE_AST, 0, 1e-3)
    cosine = ScheduleConfig(kind="cosine", warmup_steps=1, total_steps=10, min_lr=1e-2)
    with pytest.raises(ConfigError, match="min_lr"):
        resolve(cosine, 10, 1e-3)
