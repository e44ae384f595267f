# SPDX-License-Identifier: Apache-2.0
"""What has to hold on a GPU: the same bits as on the CPU, new masks in each replay, no wait of the host in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from masktrain.kernels.block_marks import block_marks
from masktrain.kernels.dropout import attention_keep_padded, dropout
from masktrain.kernels.select_tokens import select_tokens
from masktrain.recipes import distinct, find
from masktrain.training.op_cases import Problem, forced
from suite.harness import CannotRun, Check, Row
from suite.steps import Trainer

TOLERANCE = 1e-4  # of loss and gradient norm of a float32 step, relative


def checks(device: torch.device, *, rehearsal: bool) -> Iterator[Check]:
    """Yield the checks of properties."""
    clips, frames = (3, 64) if rehearsal else (16, None)
    args = (device, clips, frames)
    yield Check(
        "property dropout bits",
        "Does dropout drop the same values here as on the CPU?",
        partial(_dropout_bits, *args),
    )
    yield Check(
        "property mask plans",
        "Does each recipe draw the same masks here as on the CPU?",
        partial(_plans, *args),
    )
    for name in distinct():
        yield Check(
            f"property step equals the CPU {name}",
            f"Does a float32 step of {name} give the loss and gradient norm that the references give on the CPU?",
            partial(_step_equals, device, name),
        )
    yield Check(
        "property compiled draw",
        "Does a compiled step draw new masks from a new counter, equal to eager ones, without compiling again?",
        partial(_compiled, *args),
    )
    yield Check(
        "property captured draw",
        "Does a captured CUDA graph draw new masks and dropout from a new counter, equal to eager ones?",
        partial(_captured, *args),
    )
    for name in distinct():
        yield Check(
            f"property no host sync {name}",
            f"Does the host wait for the GPU in a step of {name}?",
            partial(_no_sync, device, name),
        )


def _draw(problem: Problem) -> tuple[Callable[[Tensor], tuple[Tensor, ...]], Tensor]:
    """Return what draws masks and dropout of a batch of equal clips from a counter, and the counter."""
    layout, plan, grid = problem.layout, problem.plan, problem.grid
    n_masked = tuple(plan.n_masked)
    x = torch.ones(len(problem.lengths), 64, device=problem.device)
    positions = torch.zeros_like(layout.clip_ids)

    def draw(counter: Tensor) -> tuple[Tensor, ...]:
        marks = block_marks(
            layout.cu_tokens,
            layout.lengths,
            n_masked,
            counter,
            layout.clip_ids,
            freq=grid.freq,
            order=grid.order,
        )
        visible, masked = select_tokens(
            layout.cu_tokens, layout.lengths, plan.n_visible, counter, layout.clip_ids, classes=marks
        )
        return visible, masked, dropout(x, 0.25, counter, layout.clip_ids, positions, site=3)

    return draw, problem.key.counter.clone()


def _plans(device: torch.device, clips: int, frames: int | None) -> Row:
    for name in distinct():
        problem = Problem(find(name, "tiny"), device, clips, frames)
        for draw in range(problem.recipe.model.masks):
            ours = problem.recipe.masking.plan(problem.layout, problem.key, draw, problem.view)
            wanted = problem.reference_plan(draw)
            for field in ("visible", "masked", "cu_visible", "cu_masked"):
                differs = f"{name}, mask {draw}: {field} differs"
                assert torch.equal(getattr(ours, field), getattr(wanted, field)), differs
    return {}


def _dropout_bits(device: torch.device, clips: int, frames: int | None) -> Row:
    problem = Problem(find("mae_ast_frame", "tiny"), device, clips, frames)
    lengths, ids, counter = problem.plan.n_visible, problem.layout.clip_ids, problem.key.counter
    rows = torch.arange(clips, device=device)
    for width in (64, 127, 768):
        ones = torch.ones(clips, width, device=device)
        ours = dropout(ones, 0.1, counter, ids, rows, site=9)
        with forced("reference"):
            theirs = dropout(ones.cpu(), 0.1, counter.cpu(), ids.cpu(), rows.cpu(), site=9)
        assert torch.equal(ours.cpu() == 0, theirs == 0), f"width {width}: other values are dropped"
    ours = attention_keep_padded(lengths, 4, 0.1, counter, ids, site=5)
    with forced("reference"):
        theirs = attention_keep_padded(lengths, 4, 0.1, counter.cpu(), ids.cpu(), site=5)
    assert torch.equal(ours.cpu() == 0, theirs == 0), "attention: other weights are dropped"
    return {}


def _step_equals(device: torch.device, name: str) -> Row:
    results = []
    for place, implementation in ((device, "auto"), (torch.device("cpu"), "reference")):
        with forced(implementation):
            trainer = Trainer(name, "tiny", place, clips=3, seconds=0.4, precision="fp32", layers=2)
            result = trainer.step()
            results.append((float(result.loss), float(result.grad_norm)))
    (loss, norm), (loss_cpu, norm_cpu) = results
    found = {"loss": loss, "loss_cpu": loss_cpu, "grad_norm": norm, "grad_norm_cpu": norm_cpu}
    assert abs(loss - loss_cpu) <= TOLERANCE * abs(loss_cpu), found
    assert abs(norm - norm_cpu) <= 10 * TOLERANCE * abs(norm_cpu), found
    return found


def _different(seen: list[tuple[Tensor, ...]]) -> None:
    for place, what in enumerate(("visible tokens", "masked tokens", "dropout")):
        for i, a in enumerate(seen):
            for b in seen[:i]:
                assert not torch.equal(a[place], b[place]), f"{what}: the same in two steps"


def _compiled(device: torch.device, clips: int, frames: int | None) -> Row:
    draw, counter = _draw(Problem(find("mae_ast_patch", "tiny"), device, clips, frames, uniform=True))
    graphs: list[Any] = []

    def backend(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        if device.type != "cuda":
            return graph.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, examples)

    torch._dynamo.reset()
    traced = torch.compile(draw, backend=backend, fullgraph=True)
    seen = []
    for step in range(3):
        counter[1] = step
        ours, eager = traced(counter), draw(counter)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True)), (
            f"step {step} differs from eager"
        )
        seen.append(tuple(x.clone() for x in ours))
    _different(seen)
    assert len(graphs) == 1, f"compiled {len(graphs)} times"
    return {"compilations": len(graphs)}


def _captured(device: torch.device, clips: int, frames: int | None) -> Row:
    if device.type != "cuda":
        raise CannotRun("CUDA graphs exist only on a GPU")
    draw, counter = _draw(Problem(find("mae_ast_patch", "tiny"), device, clips, frames, uniform=True))
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        draw(counter)
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = draw(counter)
    seen = []
    for step in range(3):
        counter[1] = step
        graph.replay()
        seen.append(tuple(x.clone() for x in ours))
        assert all(torch.equal(a, b) for a, b in zip(seen[-1], draw(counter), strict=True)), (
            f"step {step} differs"
        )
    _different(seen)
    return {}


def _no_sync(device: torch.device, name: str) -> Row:
    if device.type != "cuda":
        raise CannotRun("only a GPU can be waited for")
    seconds = find(name).data.clip_seconds or 10.0
    trainer = Trainer(name, "tiny", device, clips=16, seconds=seconds)
    for _ in range(3):
        trainer.step()
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step()
    except RuntimeError as error:
        import traceback

        where = "".join(traceback.format_tb(error.__traceback__)[-4:])
        raise AssertionError(f"the host waits: {error}\n{where}") from error
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}
