# SPDX-License-Identifier: Apache-2.0
"""The proof that the kernels are right on this machine: each implementation that can run, against its reference.

Floating point results and gradients are held to the rule of `masktrain.kernels._testing` (error against float64 at most
twice that of the reference in the same dtype on the same device, plus eps times the size of the truth), with SLACK on
the largest error, since the verdict is on one draw; integers have to equal those of the reference on the CPU, bit for bit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import Inaccurate, check_op, poisoned_memory
from masktrain.training.measure import Ceilings, Stopwatch, along, share
from masktrain.training.op_cases import Case, Cost, Problem, cases, forced, implementations
from masktrain.training.recipe import Recipe

OK, WRONG, DEFINITION, UNAVAILABLE = "ok", "WRONG", "definition", "not here"
# The largest error of one draw may be so many times what is allowed; the 2-norm of the errors may not exceed it. Attention
# by tiles differs from the reference in where it rounds: its largest error is up to 1.7 times the bound in some draws,
# also in torch's own kernels, while its 2-norm stays at 0.6.
SLACK = 2.0
# On a GPU a batch of whole clips. On a CPU short clips, so that all is done in about a minute: the references compute
# their random words in plain PyTorch. Grid, widths, heads and patches are the recipe's in both.
CLIPS = {"cpu": 3, "cuda": 24}
FRAMES: dict[str, int | None] = {"cpu": 128, "cuda": None}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float32, torch.float16),
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One implementation in one case.

    status: ok, WRONG, definition (the reference itself: nothing to compare), not here (it cannot run). detail: what is
    wrong, or why it cannot run. error_ratio: error over what is allowed (the larger of both norms), 0 for integers,
    None where nothing was compared or no number can say it. ms, backward_ms: median. moved: bytes that forward has to read and write. share: of
    the ceiling (copied bytes or matrix products per second, whichever takes longer) that forward reaches.
    """

    op: str
    implementation: str
    case: str
    dtype: str
    status: str
    detail: str = ""
    error_ratio: float | None = None
    ms: float | None = None
    backward_ms: float | None = None
    moved: int | None = None
    share: float | None = None
    backward_share: float | None = None
    bound: str | None = None


def verify_case(
    case: Case,
    names: Sequence[str] | None = None,
    clock: tuple[Stopwatch, Ceilings] | None = None,
    seconds: float = 0.0,
) -> Iterator[Verdict]:
    """Yield the verdict on each implementation of the case's op (only `names`).

    clock: also measure the time of what is right, for about `seconds` each.
    """
    for implementation in implementations(case.op):
        if names is None or implementation.name in names:
            yield _verdict(case, implementation.name, clock, seconds)


def _verdict(case: Case, name: str, clock: tuple[Stopwatch, Ceilings] | None, seconds: float) -> Verdict:
    found = partial(
        Verdict, op=case.op, implementation=name, case=case.name, dtype=str(case.dtype).removeprefix("torch.")
    )
    with warnings.catch_warnings():
        # of operations that have no deterministic form, while unwritten memory is poisoned
        warnings.simplefilter("ignore")
        try:
            ratio = _check(case, name)
        except KernelUnavailable as error:
            return found(status=UNAVAILABLE, detail=str(error).rpartition("cannot serve: ")[2])
        except Inaccurate as error:
            return found(
                status=WRONG,
                detail=str(error),
                error_ratio=error.ratio if math.isfinite(error.ratio) else None,
            )
        except Exception as error:
            return found(status=WRONG, detail=f"{type(error).__name__}: {error}")
        status = DEFINITION if ratio is None else OK
        took = {} if clock is None else _time(case, name, *clock, seconds, rounds=None if status == OK else 1)
        return found(status=status, error_ratio=ratio, **took)


def _check(case: Case, name: str) -> float | None:
    """Return the error ratio, None for the definition itself. Raises Inaccurate or KernelUnavailable."""
    on_cpu = all(x.device.type == "cpu" for x in case.inputs)
    if name == "reference" and (on_cpu or not case.exact):
        return None
    function = partial(case.call, implementation=name)
    if not case.exact:
        return check_op(function, partial(_reference, case), case.inputs, slack=SLACK)
    with poisoned_memory():
        actual = function(*case.inputs)
    wanted = _reference(case, *(x.cpu() for x in case.inputs))
    for place, (ours, theirs) in enumerate(zip(actual, wanted, strict=True)):
        if ours.dtype != theirs.dtype or not torch.equal(ours.cpu(), theirs):
            raise Inaccurate(f"output {place}: differs from the reference on the CPU", math.inf)
    return 0.0


def _reference(case: Case, *inputs: Tensor) -> tuple[Tensor, ...]:
    with forced("reference"):
        return case.call(*inputs)


def _time(
    case: Case, name: str, watch: Stopwatch, ceilings: Ceilings, seconds: float, rounds: int | None
) -> dict[str, Any]:
    """rounds: how many instead of `seconds`, for the references, which are slow."""
    works: dict[str, Callable[[], object]] = {}
    works["forward"] = partial(case.call, *case.inputs, implementation=name)
    if case.backward is not None:
        works["backward"] = backward_of(case, case.call(*case.inputs, implementation=name))
    took = {mode: timing.median for mode, timing in watch.race(works, seconds, rounds).items()}
    row: dict[str, Any] = {
        "ms": 1000 * took["forward"],
        "moved": case.forward.moved,
        "share": _share(case, case.forward, took["forward"], ceilings),
        "bound": "matrix" if case.forward.done else "copy",
    }
    if case.backward is not None:
        row["backward_ms"] = 1000 * took["backward"]
        row["backward_share"] = _share(case, case.backward, took["backward"], ceilings)
    return row


def _share(case: Case, cost: Cost, took: float, ceilings: Ceilings) -> float:
    return share(took, moved=cost.moved, done=cost.done, ceilings=ceilings, dtype=case.dtype)


def backward_of(case: Case, outputs: tuple[Tensor, ...]) -> Callable[[], tuple[Tensor, ...]]:
    """Return what computes the gradients of the case's inputs, along one random direction for each output."""
    wanted, directions = [x for x in case.inputs if x.requires_grad], along(outputs)
    return lambda: torch.autograd.grad(outputs, wanted, directions, retain_graph=True)


def verify(
    recipes: Sequence[tuple[Recipe, Sequence[str]]],
    device: torch.device,
    *,
    seconds: float = 0.05,
    clock: tuple[Stopwatch, Ceilings],
) -> Iterator[Verdict]:
    """Yield the verdicts on the ops named beside each recipe, at its sizes, with times. seconds: for each time."""
    done = set()
    for recipe, ops in recipes:
        problem = Problem(recipe, device, CLIPS[device.type], FRAMES[device.type])
        for case in cases(problem, DTYPES[device.type]):
            # recipes share ops of the same size
            if case.op in ops and case.signature not in done:
                done.add(case.signature)
                yield from verify_case(case, clock=clock, seconds=seconds)


def table_of_absent(verdicts: Sequence[Verdict]) -> list[tuple[str, str, str]]:
    """Return (op, implementation, reason) of what cannot run, each once."""
    return sorted({(v.op, v.implementation, v.detail) for v in verdicts if v.status == UNAVAILABLE})
