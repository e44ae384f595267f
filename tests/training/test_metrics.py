# SPDX-License-Identifier: Apache-2.0
"""Rows of a run against numbers worked out by hand on a clock that the test moves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from masktrain.errors import RunError
from masktrain.training.metrics import EXPLODED, RATES, Meter, check_finite, peak_flops, peak_memory

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Numbers:
    """One step, as the loop hands it over."""

    loss: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor = field(default_factory=lambda: torch.tensor(1.5))
    lr: float = 1e-3
    clips: int = 8
    visible: int = 250
    tokens: int = 1000
    padding: int = 0
    flops: int = 4_000_000_000
    clips_digest: int = 77


def numbers(loss: float, **values: object) -> Numbers:
    return Numbers(torch.tensor(loss), **values)  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_rates_are_those_of_the_interval() -> None:
    clock = Clock()
    meter = Meter(CPU, 10, peak=1e12, devices=2, clock=clock)
    clock.now += 30  # the first step: slow, in no rate
    meter.add(numbers(9.0), data_wait_s=25.0)
    first = meter.row(1)
    assert all(first[name] is None for name in RATES)
    assert first["eta_s"] is None
    for loss, seconds, wait in ((5.0, 2.0, 0.25), (7.0, 1.0, 0.5), (4.0, 1.0, 0.25)):
        clock.now += seconds
        meter.add(numbers(loss, parts={"mse": torch.tensor(0.25), "info_nce": torch.tensor(1.5)}), wait)
    row = meter.row(4)
    assert row["step"] == 4
    assert (row["loss"], row["loss_max"]) == (4.0, 7.0)
    assert (row["loss_mse"], row["loss_info_nce"], row["grad_norm"], row["lr"]) == (0.25, 1.5, 1.5, 1e-3)
    assert row["clips_per_s"] == pytest.approx(3 * 8 / 4)
    assert row["visible_tokens_per_s"] == pytest.approx(3 * 250 / 4)
    assert row["tokens_per_s"] == pytest.approx(3 * 1000 / 4)
    assert row["data_wait_share"] == pytest.approx(1.0 / 4)
    assert row["step_ms"] == pytest.approx(4000 / 3)
    # 3 steps of 4 GFLOP in 4 s on two devices: 1.5 GFLOP/s each, of a peak of 1000
    assert row["tflops"] == pytest.approx(0.0015)
    assert row["mfu"] == pytest.approx(0.0015)
    assert row["elapsed_s"] == pytest.approx(34)
    assert row["eta_s"] == pytest.approx(6 * 4 / 3)
    assert row["clip_ids"] == 77

    clock.now += 10
    meter.add(numbers(3.0), 0.0)
    later = meter.row(5)
    assert (later["loss_max"], later["step_ms"]) == (3.0, 10000)
    assert later["eta_s"] == pytest.approx(5 * 14 / 4)


def test_pauses_are_in_no_rate_but_in_the_elapsed_time() -> None:
    clock = Clock()
    meter = Meter(CPU, 3, elapsed_s=1000.0, clock=clock)
    meter.add(numbers(1.0), 0.0)
    clock.now += 2
    with meter.paused():
        clock.now += 50
    meter.add(numbers(1.0), 0.0)
    row = meter.row(2)
    assert row["step_ms"] == pytest.approx(2000)
    assert row["elapsed_s"] == pytest.approx(1052) and meter.paused_seconds == 50
    clock.now += 1
    meter.add(numbers(1.0), 0.0)
    assert meter.row(3)["eta_s"] == 0.0


def test_the_first_step_is_left_out_of_a_longer_interval() -> None:
    clock = Clock()
    meter = Meter(CPU, 100, clock=clock)
    clock.now += 60
    meter.add(numbers(1.0), 59.0)
    clock.now += 4
    meter.add(numbers(1.0), 1.0)
    clock.now += 4
    meter.add(numbers(1.0), 1.0)
    row = meter.row(3)
    assert row["clips_per_s"] == pytest.approx(2 * 8 / 8)
    assert row["data_wait_share"] == pytest.approx(0.25)
    assert row["mfu"] is None  # no peak is known


def test_the_loss_of_a_row_is_the_step_s_to_the_bit() -> None:
    value = torch.tensor(1 / 3, dtype=torch.float32)
    meter = Meter(CPU, 2)
    meter.add(Numbers(value, parts={"mse": torch.tensor(1 / 7, dtype=torch.float64)}), 0.0)
    row = meter.row(1)
    assert torch.tensor(row["loss"], dtype=torch.float32) == value
    assert row["loss_mse"] == 1 / 7


def test_a_nan_between_two_rows_is_not_lost() -> None:
    meter = Meter(CPU, 10)
    for loss in (1.0, math.nan, 2.0):
        meter.add(numbers(loss), 0.0)
    row = meter.row(3)
    assert row["loss"] == 2.0 and math.isnan(row["loss_max"])
    with pytest.raises(RunError, match="before step 3 was nan"):
        check_finite(row)


def test_padding_share_and_row_without_a_step() -> None:
    meter = Meter(CPU, 10)
    meter.add(numbers(1.0, padding=250), 0.0)
    assert meter.row(1)["padding_share"] == 0.25
    with pytest.raises(ValueError, match="no step"):
        meter.row(2)


def test_no_value_leaves_the_device_between_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(CPU, 10)

    def refuse(self: Tensor, *_: object) -> None:
        raise AssertionError("a value was read between two rows")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
            patch.setattr(Tensor, name, refuse)
        for _ in range(3):
            meter.add(numbers(1.0), 0.0)
    assert meter.row(3)["loss"] == 1.0


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("Tesla V100-SXM2-32GB", "fp16", 125),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "fp16", 312),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H200", "bf16", 989),
    ],
)
def test_known_peaks(name: str, precision: str, tera: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA L40", "bf16"),
        ("NVIDIA GH200 480GB", "bf16"),
        ("NVIDIA H100 PCIe", "bf16"),
        ("NVIDIA H100 NVL", "bf16"),
        ("NVIDIA H200 NVL", "bf16"),
        ("Tesla V100-PCIE-16GB", "fp16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp32"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("", "fp32"),
    ],
)
def test_peaks_are_withheld_where_they_are_not_known(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_peak_memory_of_the_cpu_grows_with_what_is_held() -> None:
    before = peak_memory(CPU)
    held = torch.ones(before + 64 * 2**20, dtype=torch.uint8)
    assert peak_memory(CPU) >= held.numel()


def row_of(**values: float) -> dict[str, float]:
    return {"step": 5, "loss": 2.0, "loss_max": 2.0, "loss_mse": 0.5, "grad_norm": 1.0, "lr": 1e-3, **values}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"loss": math.nan, "loss_max": math.nan}, "loss of step 5 is nan"),
        ({"loss": math.inf, "loss_max": math.inf}, "loss of step 5 is inf"),
        ({"loss_max": 4.0 * EXPLODED + 1}, "times its first 4"),
        ({"grad_norm": math.inf}, "gradient norm of step 5 is inf"),
    ],
)
def test_a_run_that_has_broken_down_stops(values: dict[str, float], said: str) -> None:
    with pytest.raises(RunError) as caught:
        check_finite(row_of(**values), first_loss=4.0)
    assert said in str(caught.value)
    assert "mse 0.5" in str(caught.value) and "lower learning rate" in str(caught.value)


def test_a_healthy_run_goes_on() -> None:
    check_finite(row_of(), first_loss=4.0)
    check_finite(row_of(loss_max=4.0 * EXPLODED), first_loss=4.0)
    check_finite(row_of(grad_norm=math.inf), first_loss=4.0, scaled=True)
