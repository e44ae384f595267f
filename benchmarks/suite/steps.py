# SPDX-License-Identifier: Apache-2.0
"""How fast is a training step of each recipe: clips, tokens, share of the peak, how busy the GPU is, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from masktrain.kernels.varlen_attention import op as varlen_attention
from masktrain.models import registry
from masktrain.recipes import RECIPES, distinct, find
from masktrain.training import optim, precision, schedule
from masktrain.training.distributed import World
from masktrain.training.metrics import peak_flops, peak_memory
from masktrain.training.step import Step, StepResult
from masktrain.types import AudioBatch
from suite.harness import CannotRun, Check, Row

# name -> (attention implementation or None for what serves, attention dropout as published?, compiled?)
FORMS: dict[str, tuple[str | None, bool, bool]] = {
    "published": (None, True, False),
    "published, triton attention": ("triton", True, False),
    "published, native attention": ("native", True, False),
    "no attention dropout, native attention": ("native", False, False),
    "no attention dropout, triton attention": ("triton", False, False),
    "no attention dropout, native attention, compiled": ("native", False, True),
}
BATCHES = (512, 64)


class Trainer:
    """A recipe, ready to step on random audio that lies on the device: loading is not measured."""

    def __init__(
        self,
        recipe: str,
        size: str,
        device: torch.device,
        *,
        clips: int,
        seconds: float,
        precision: str = "auto",
        attention_dropout: bool = True,
        layers: int | None = None,
        compiled: bool = False,
    ) -> None:
        found = find(recipe, size)
        changes: dict[str, float] = {} if attention_dropout else {"attention_dropout": 0.0}
        if compiled:
            # each set of layers that a step drops would be compiled by itself
            changes["encoder_layerdrop"] = 0.0
        if layers is not None:
            changes |= {"encoder_layers": layers, "decoder_layers": 1}
        # models without dropout have no such fields
        changes = {name: value for name, value in changes.items() if hasattr(found.model, name)}
        self.recipe = replace(found, model=replace(found.model, **changes), batch_size=clips)
        torch.manual_seed(0)
        net = registry.build(self.recipe.model, self.recipe.grid, self.recipe.input_norm).to(device)
        lr = self.recipe.optim.peak_lr(clips)
        self._step = Step(
            self.recipe,
            net,
            optim.build(net, self.recipe.optim, lr),
            schedule.resolve(self.recipe.schedule, 1000, lr),
            World(0, 1, device, None),
            _precision(precision, device),
        )
        if compiled:
            backend = "inductor" if device.type == "cuda" else "eager"
            self._step.distributed = torch.compile(net, backend=backend, dynamic=False, fullgraph=True)
        rate = self.recipe.frontend.sample_rate
        length = round(seconds * rate)
        noise = 0.1 * torch.randn(clips * length, generator=torch.Generator().manual_seed(1))
        ids = torch.arange(clips)
        self.audio = AudioBatch(
            noise.to(device), (length,) * clips, (rate,) * clips, ids, torch.zeros_like(ids)
        )
        self.done = 0

    @property
    def precision(self) -> str:
        """fp32, bf16 or fp16."""
        return self._step.precision.name

    def step(self) -> StepResult:
        """Do the next step."""
        self.done += 1
        return self._step(self.done - 1, [self.audio])

    def frontend(self) -> object:
        """Compute the log-mel of the batch, as a step does first."""
        return self._step.spectrogram(self.audio)


def _precision(name: str, device: torch.device) -> Any:
    return precision.choose(name, device)


@contextmanager
def only_attention(implementation: str | None) -> Iterator[None]:
    """Let this implementation alone serve varlen_attention, also where it would not unasked."""
    before = varlen_attention.IMPLEMENTATIONS
    if implementation is not None:
        kept = tuple(i for i in before if i.name == implementation)
        varlen_attention.IMPLEMENTATIONS = tuple(replace(i, not_unasked=lambda *_: None) for i in kept)  # type: ignore[assignment]
    try:
        yield
    finally:
        varlen_attention.IMPLEMENTATIONS = before


def forms(recipe: str) -> list[str]:
    """Return the forms that differ for a recipe: without attention dropout, those with it are those without."""
    has_dropout = getattr(find(recipe).model, "attention_dropout", 0.0) > 0
    return [
        form
        for form, (_, published, _) in FORMS.items()
        if has_dropout or form == "published" or not published
    ]


def checks(device: torch.device, *, rehearsal: bool, variants: bool) -> Iterator[Check]:
    """Yield the steps of the recipes in each form, or those of their variants as published."""
    for batch in BATCHES:
        for recipe in RECIPES:
            if (recipe not in distinct()) == variants:
                for form in forms(recipe) if not variants else list(FORMS)[:1]:
                    yield Check(
                        f"step {recipe} {batch} {form}",
                        f"How fast is a step of {recipe} at batch {batch}, {form}, eager unless it says compiled?",
                        partial(_measure, device, recipe, batch, form, rehearsal),
                    )


def _measure(device: torch.device, recipe: str, batch: int, form: str, rehearsal: bool) -> Row:
    attention, dropout, compiled = FORMS[form]
    clips, seconds = (
        (1 if batch == 64 else 2, 0.2) if rehearsal else (batch, find(recipe).data.clip_seconds or 10.0)
    )
    with only_attention(attention):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # of other checks
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        trainer = Trainer(
            recipe, "tiny" if rehearsal else "base", device, clips=clips, seconds=seconds,
            attention_dropout=dropout, layers=1 if rehearsal else None, compiled=compiled,
        )  # fmt: skip
        wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else _nothing
        for _ in range(0 if rehearsal else 3):
            trainer.step()
        results, taken = _timed(trainer, wait, 1 if rehearsal else 8)
        loss = float(results[0].loss)
        assert loss == loss and abs(loss) < float("inf"), f"the loss is {loss}"
        memory = peak_memory(device) - held
        frontend_s = _seconds(trainer.frontend, wait)
        busy = _busy(trainer, wait, device, steps=1 if rehearsal else 2)
    took = sum(taken)
    flops = sum(r.flops for r in results) / took
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name, trainer.precision)
    ordered = sorted(taken)
    return {
        "recipe": recipe, "batch": batch, "form": form, "precision": trainer.precision, "clips": clips,
        "clip_seconds": seconds, "attention_dropout": getattr(trainer.recipe.model, "attention_dropout", 0.0),
        "layerdrop": getattr(trainer.recipe.model, "encoder_layerdrop", 0.0), "compiled": compiled,
        "step_ms": 1000 * ordered[len(ordered) // 2], "p20_ms": 1000 * ordered[len(ordered) // 5],
        "p80_ms": 1000 * ordered[4 * len(ordered) // 5], "n": len(ordered),
        "clips_per_s": sum(r.clips for r in results) / took, "tokens_per_s": sum(r.tokens for r in results) / took,
        "visible_tokens_per_s": sum(r.visible for r in results) / took, "tflops": flops / 1e12,
        "mfu": flops / peak if peak else None, "gpu_busy": busy, "peak_memory_gib": memory / 2**30,
        "frontend_ms": 1000 * frontend_s, "loss": loss,
    }  # fmt: skip


def _nothing() -> None:
    pass


def _timed(trainer: Trainer, wait: Callable[[], object], steps: int) -> tuple[list[StepResult], list[float]]:
    results, taken = [], []
    wait()
    for _ in range(steps):
        begin = time.perf_counter()
        results.append(trainer.step())
        wait()
        taken.append(time.perf_counter() - begin)
    return results, taken


def _seconds(work: Callable[[], object], wait: Callable[[], object]) -> float:
    work()
    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def _busy(trainer: Trainer, wait: Callable[[], object], device: torch.device, steps: int) -> float | None:
    """Return the share of the time between the first and the last kernel of the steps in which a kernel runs."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        for _ in range(steps):
            trainer.step()
        wait()
    wanted = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in recorded.events() if e.device_type == wanted
    )
    if not spans:
        raise CannotRun("the profiler saw no kernel")
    share = covered(spans) / (max(end for _, end in spans) - spans[0][0])
    assert 0 < share <= 1, f"busy for {share} of the time"
    return share if device.type == "cuda" else None


def covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of spans, sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
