# SPDX-License-Identifier: Apache-2.0
"""How fast each implementation of an op is: against the eager and the compiled reference, and against the machine.

All providers of a case are measured in interleaved rounds of one process, after their results were checked in it.
"""

from __future__ import annotations

import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import masktrain
from masktrain.kernels.varlen_attention import _native as attention_forms
from masktrain.training.measure import Ceilings, Stopwatch, Timing, share, timing
from masktrain.training.op_cases import OPS, Case, Cost, Problem, cases, forced
from masktrain.training.recipe import Recipe
from masktrain.training.run_dir import cpu_model, git_commit
from masktrain.training.verify import DEFINITION, OK, backward_of, verify_case

Row = dict[str, Any]
Provider = Callable[..., tuple[Tensor, ...]]
GROUPS = {"kernels": tuple(op for op in OPS if op != "varlen_attention"), "attention": ("varlen_attention",)}
# One call that takes longer than this many seconds is measured once and not in the rounds.
SLOW = 1.0
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}


def provenance(device: torch.device) -> Row:
    """Return what a measurement was made with: device, versions, commit, date."""
    row: Row = {
        "date": date.today().isoformat(),
        "commit": git_commit(Path(masktrain.__file__).resolve().parent),
    }
    row |= {"masktrain": masktrain.__version__, "torch": torch.__version__, "triton": None}
    with suppress(metadata.PackageNotFoundError):
        row["triton"] = metadata.version("triton")
    if device.type != "cuda":
        return row | {"device": cpu_model(), "threads": torch.get_num_threads(), "cpus": os.cpu_count()}
    row |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    query = "power.limit,clocks.max.sm,clocks.max.mem,driver_version"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={device.index or 0}"]
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
        row |= dict(zip(query.split(","), (part.strip() for part in answer.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        row["power.limit"] = None
    return row


def ceiling_rows(ceilings: Ceilings, dtypes: Sequence[torch.dtype]) -> list[Row]:
    """Return the calibration: copied bytes per second and operations per second of matrix products."""
    rows: list[Row] = [{"ceiling": "copy", "gb_per_s": ceilings.copy / 1e9}]
    return rows + [
        {"ceiling": f"matrix {_name(d)}", "tflop_per_s": ceilings.matrix(d) / 1e12} for d in dtypes
    ]


def bench(
    recipes: Sequence[tuple[Recipe, Sequence[str]]],
    watch: Stopwatch,
    ceilings: Ceilings,
    *,
    clips: int,
    seconds: float,
    frames: int | None = None,
    uniform: bool = False,
    compiled: bool = True,
) -> Iterator[Row]:
    """Yield a row for each op named beside a recipe, at its sizes, each provider and mode. seconds: for each of them.

    clips, frames, uniform: of the batch, see `Problem`. compiled: also measure the reference under torch.compile.
    """
    done = set()
    for recipe, ops in recipes:
        if not ops:
            continue
        problem = Problem(recipe, watch.device, clips, frames, uniform=uniform)
        for case in cases(problem, DTYPES[watch.device.type]):
            if case.op in ops and case.signature not in done:
                done.add(case.signature)
                yield from bench_case(case, watch, ceilings, seconds=seconds, compiled=compiled)


def bench_case(
    case: Case, watch: Stopwatch, ceilings: Ceilings, *, seconds: float, compiled: bool
) -> Iterator[Row]:
    """Yield a row for each provider and mode: median_ms, p20_ms, p80_ms, n, and the share of the roofline."""
    providers: dict[str, Provider] = {}
    for verdict in verify_case(case):
        name = verdict.implementation
        if verdict.status in (OK, DEFINITION):
            providers["eager reference" if name == "reference" else name] = partial(
                case.call, implementation=name
            )
        else:
            yield _row(case, name, "forward", status=verdict.status, detail=verdict.detail)
    providers |= _forms(case)
    if compiled:
        # A new function each time: compilations of other cases must not count as recompilations of this one.
        def reference(*inputs: Tensor) -> tuple[Tensor, ...]:
            return case.call(*inputs, implementation="reference")

        torch._dynamo.reset()
        providers["compiled reference"] = torch.compile(reference)
    ready: dict[str, tuple[Provider, tuple[Tensor, ...]]] = {}
    for name, provider in providers.items():
        try:
            with warnings.catch_warnings(), forced("reference" if "reference" in name else "auto"):
                warnings.simplefilter("ignore")
                ready[name] = (provider, provider(*case.inputs))
        except Exception as error:
            yield _row(
                case,
                name,
                "forward",
                status="cannot run",
                detail=f"{type(error).__name__}: {str(error)[:300]}",
            )
    works: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        name: partial(provider, *case.inputs) for name, (provider, _) in ready.items()
    }
    yield from _race(case, "forward", case.forward, works, watch, ceilings, seconds)
    if case.backward is not None:
        # compiled code frees what it saved unless told not to
        with torch._functorch.config.patch(donated_buffer=False):
            gradients = {name: backward_of(case, outputs) for name, (_, outputs) in ready.items()}
            yield from _race(case, "backward", case.backward, gradients, watch, ceilings, seconds)


def _race(
    case: Case,
    mode: str,
    cost: Cost,
    works: dict[str, Callable[[], tuple[Tensor, ...]]],
    watch: Stopwatch,
    ceilings: Ceilings,
    seconds: float,
) -> Iterator[Row]:
    fast, took = dict(works), {}
    for name, work in works.items():
        with forced("reference" if "reference" in name else "auto"):
            work()  # compiles what is compiled
            begin = time.perf_counter()
            first = watch.once(work)()
            if time.perf_counter() - begin > SLOW:
                took[name] = timing([first])
                del fast[name]
    rounds: dict[str, Callable[[], object]] = {
        name: partial(_forced, name, work) for name, work in fast.items()
    }
    took |= watch.race(rounds, seconds * len(rounds)) if rounds else {}
    for name in works:
        yield _row(case, name, mode, status=OK, timing=took[name], cost=cost, ceilings=ceilings)


def _forced(provider: str, work: Callable[[], object]) -> object:
    """Do the work; the ops inside a reference are references as well, and its backward may call them again."""
    if "reference" not in provider:
        return work()
    with forced("reference"):
        return work()


def _forms(case: Case) -> dict[str, Provider]:
    """Return the forms in which torch offers attention, beside the one that `native` picks."""
    if case.packing is None or not case.variant.endswith("dropout 0"):
        return {}
    (cu, lengths), device = case.packing, case.inputs[0].device
    forms: dict[str, Callable[..., Tensor]] = {
        "torch split": lambda q, k, v: attention_forms.split(q, k, v, lengths),
        "torch padded": lambda q, k, v: attention_forms.padded(q, k, v, lengths, 1.0),
    }
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if attention_forms.varlen_why_not(case.dtype, capability, case.sizes["width"]) is None:
            forms["torch varlen"] = lambda q, k, v: attention_forms.varlen(q, k, v, cu, lengths)
    return {name: partial(_single, form) for name, form in forms.items()}


def _single(form: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    return (form(*inputs),)


def _row(
    case: Case,
    provider: str,
    mode: str,
    *,
    status: str,
    detail: str = "",
    timing: Timing | None = None,
    cost: Cost | None = None,
    ceilings: Ceilings | None = None,
) -> Row:
    row: Row = {
        "op": case.op,
        "provider": provider,
        "mode": mode,
        "dtype": _name(case.dtype),
        "case": case.name,
    }
    row |= {"sizes": case.sizes, "status": status, "detail": detail}
    if timing is not None and cost is not None and ceilings is not None:
        row |= {f"{q}_ms": 1000 * getattr(timing, q) for q in ("median", "p20", "p80")} | {"n": timing.n}
        row |= {"moved_bytes": cost.moved, "flop": cost.done, "bound": "matrix" if cost.done else "copy"}
        row["roofline_share"] = share(
            timing.median, moved=cost.moved, done=cost.done, ceilings=ceilings, dtype=case.dtype
        )
    return row


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
