# SPDX-License-Identifier: Apache-2.0
"""The numbers of a run: one row per logged step, and the check that its loss is still one.

Losses and gradient norms stay on the device until a row is asked for; everything else is known on the host.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from masktrain.errors import RunError

Row = dict[str, Any]

# A loss this many times the first one is no longer training: the runs that recover stay far below it.
EXPLODED = 100.0

RATES = ("clips_per_s", "visible_tokens_per_s", "tokens_per_s", "tflops", "mfu", "data_wait_share", "step_ms")

# Dense peaks in TFLOP/s of the datasheets: (device name, precisions, peak). Products that share a name and
# differ in clocks or power (PCIe, NVL) have other peaks and are left out, so that no MFU is stated against a
# wrong one.
PEAKS: tuple[tuple[str, tuple[str, ...], float], ...] = (
    (r"\bV100-SXM", ("fp16",), 125.0),
    (r"\bA100\b", ("fp16", "bf16"), 312.0),
    (r"\bL40S\b", ("fp16", "bf16"), 362.05),
    (r"\bH100\b(?!.*(PCIe|NVL))", ("fp16", "bf16"), 989.0),
    (r"\bH200\b(?!.*NVL)", ("fp16", "bf16"), 989.0),
)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the dense FLOP/s of one device in fp16, bf16 or fp32 products, None where it is not known.

    device_name: as torch.cuda.get_device_name says it. A slice of a GPU (MIG) has no known peak.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, precisions, tera in PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return tera * 1e12 if precision in precisions else None
    return None


class StepNumbers(Protocol):
    """What one step hands to the meter, over the whole batch of all ranks. loss, parts, grad_norm: tensors of
    one element. clips, visible, tokens, padding: counts. flops: as really done. clips_digest: of the clip
    ids."""

    @property
    def loss(self) -> Tensor: ...
    @property
    def parts(self) -> Mapping[str, Tensor]: ...
    @property
    def grad_norm(self) -> Tensor: ...
    @property
    def lr(self) -> float: ...
    @property
    def clips(self) -> int: ...
    @property
    def visible(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def padding(self) -> int: ...
    @property
    def flops(self) -> int: ...
    @property
    def clips_digest(self) -> int: ...


class Meter:
    """Collects the steps between two rows. `add` never waits for the device; `row` does, once.

    The first step of a process (it allocates, compiles and fills the loader) is in no rate: a row that covers
    nothing else has null rates.
    """

    def __init__(
        self,
        device: torch.device,
        total_steps: int,
        *,
        peak: float | None = None,
        devices: int = 1,
        elapsed_s: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """total_steps: of the run, for the ETA. peak: FLOP/s of one device, None withholds the MFU. devices:
        how many share a step. elapsed_s: seconds that a resumed run has behind it. clock: in seconds."""
        self.device = device
        self.total_steps = total_steps
        self.peak = peak
        self.devices = devices
        self._clock = clock
        self._origin = clock() - elapsed_s
        self._warm = False
        self._measured_s = 0.0
        self._measured_steps = 0
        self.paused_seconds = 0.0
        self._loss_max: Tensor | None = None
        self._last: StepNumbers | None = None
        self._restart()

    def _restart(self) -> None:
        self._start = self._clock()
        self._steps = self._clips = self._visible = self._tokens = self._flops = 0
        self._wait_s = 0.0

    def add(self, result: StepNumbers, data_wait_s: float) -> None:
        """Take in one step. data_wait_s: how long it waited for its audio."""
        loss = result.loss.detach()
        # maximum keeps a NaN
        self._loss_max = loss if self._loss_max is None else torch.maximum(self._loss_max, loss)
        self._last = result
        if not self._warm:
            self._warm = True
            self._restart()
            return
        self._steps += 1
        self._clips += result.clips
        self._visible += result.visible
        self._tokens += result.tokens
        self._flops += result.flops
        self._wait_s += data_wait_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is done meanwhile (validation, pictures) out of the rates; it stays in elapsed_s."""
        before = self._clock()
        try:
            yield
        finally:
            took = self._clock() - before
            self._start += took
            self.paused_seconds += took

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start of the run."""
        return self._clock() - self._origin

    def row(self, step: int) -> Row:
        """Return the row of step `step` (steps done, from 1) and start the next interval.

        Of this step: loss, loss_<part>, lr, grad_norm, clip_ids (a digest), padding_share. Over the steps
        since the last row: loss_max, clips_per_s, visible_tokens_per_s, tokens_per_s (all devices together),
        tflops (per device), mfu (of the dense peak; null where that is not known), data_wait_share, step_ms.
        Since the start: peak_memory_gib (allocated on the GPU; resident on the CPU), elapsed_s, eta_s.
        """
        if self._last is None or self._loss_max is None:
            raise ValueError("Meter.row: no step was added since the last row")
        last = self._last
        named = {"loss": last.loss, **{f"loss_{name}": value for name, value in last.parts.items()}}
        named |= {"loss_max": self._loss_max, "grad_norm": last.grad_norm}
        # float64 holds each float32 exactly; one copy to the host for all
        values = torch.stack(
            [value.detach().to(self.device, torch.float64).reshape(()) for value in named.values()]
        )
        numbers: Row = dict(zip(named, values.tolist(), strict=True))
        now = self._clock()
        seconds = now - self._start
        self._measured_s += seconds if self._steps else 0.0
        self._measured_steps += self._steps
        row: Row = {"step": step, **numbers, "lr": last.lr}
        row |= self._rates(seconds)
        row["padding_share"] = last.padding / last.tokens if last.tokens else 0.0
        row["peak_memory_gib"] = peak_memory(self.device) / 2**30
        row["elapsed_s"] = now - self._origin
        row["eta_s"] = self._eta(step)
        row["clip_ids"] = last.clips_digest
        self._last = self._loss_max = None
        self._restart()
        return row

    def _rates(self, seconds: float) -> Row:
        if not self._steps or seconds <= 0:
            return dict.fromkeys(RATES)
        flops = self._flops / seconds / self.devices
        return {
            "clips_per_s": self._clips / seconds,
            "visible_tokens_per_s": self._visible / seconds,
            "tokens_per_s": self._tokens / seconds,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak if self.peak else None,
            "data_wait_share": min(1.0, self._wait_s / seconds),
            "step_ms": 1000 * seconds / self._steps,
        }

    def _eta(self, step: int) -> float | None:
        if step >= self.total_steps:
            return 0.0
        if not self._measured_steps:
            return None
        return (self.total_steps - step) * self._measured_s / self._measured_steps


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process ever held: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


def check_finite(row: Mapping[str, Any], first_loss: float | None = None, *, scaled: bool = False) -> None:
    """Raise RunError where a row shows that training has broken down: a loss that is no finite number or over
    `EXPLODED` times the run's first, or gradients that are not finite.

    row: as `Meter.row` gives it. scaled: with loss scaling, a step whose gradients overflow is skipped by
    design.
    """
    step, loss, highest = row["step"], row["loss"], row["loss_max"]
    if not math.isfinite(loss):
        what = f"the loss of step {step} is {loss}"
    elif not math.isfinite(highest):
        what = f"a loss before step {step} was {highest}"
    elif first_loss is not None and highest > EXPLODED * abs(first_loss):
        what = f"the loss reached {highest:.4g} by step {step}, {EXPLODED:g} times its first {first_loss:.4g}"
    elif not scaled and not math.isfinite(row["grad_norm"]):
        what = f"the gradient norm of step {step} is {row['grad_norm']} at a loss of {loss:.4g}"
    else:
        return
    parts = ", ".join(f"{name.removeprefix('loss_')} {row[name]:.4g}" for name in row if _is_part(name))
    raise RunError(
        f"Training has broken down: {what} (parts of step {step}: {parts or 'none'}; gradient norm "
        f"{row['grad_norm']:.4g}, learning rate {row['lr']:.3g}). Start again with a lower learning rate, a "
        "longer warm-up, gradient clipping or another --precision; --init-from takes the weights of an "
        "earlier checkpoint."
    )


def _is_part(name: str) -> bool:
    return name.startswith("loss_") and name != "loss_max"
