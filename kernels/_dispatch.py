# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an op serves here, and why the others were passed over.

An implementation is a name ("triton", "native", "reference"), a function, and a predicate that answers either
None (it can serve these tensors) or one sentence why it cannot. An explicit request that cannot be met raises
that sentence; it never falls back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ENV = "MASKTRAIN_KERNELS"
NAMES = ("triton", "native", "reference")


class KernelUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot serve these arguments."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    `why_not(*tensors)` takes what `choose` was given and returns None or the reason it cannot serve.
    `not_unasked(*tensors)` likewise returns None, or why it can serve but does so only when asked for by name.
    """

    name: str
    function: Callable[..., Any]
    why_not: Callable[..., str | None]
    not_unasked: Callable[..., str | None] = lambda *_: None


@dataclass(frozen=True)
class Choice:
    """The implementation that serves, with the reason for each that was passed over."""

    op: str
    name: str
    function: Callable[..., Any]
    passed_over: tuple[tuple[str, str], ...]


_chosen: dict[tuple[str, str], Choice] = {}


def requested() -> str | None:
    """Return the implementation that MASKTRAIN_KERNELS asks for, or None for the best that serves."""
    value = os.environ.get(ENV, "").strip().lower()
    if value in ("", "auto"):
        return None
    if value not in NAMES:
        raise KernelUnavailable(f"{ENV}={value!r} is not known; allowed: auto, {', '.join(NAMES)}.")
    return value


def choose(
    op: str, implementations: Sequence[Implementation], *args: Any, request: str | None = None
) -> Choice:
    """Return the first implementation that can serve `args`, in the order given (best first).

    `request`, or else MASKTRAIN_KERNELS, names one: then it serves or KernelUnavailable says why not. An op
    that has no implementation of the name that MASKTRAIN_KERNELS asks for serves as usual: the variable
    speaks to the ops that have a choice.
    """
    wanted = request or requested()
    names = [i.name for i in implementations]
    if request is not None and request not in names:
        raise KernelUnavailable(f"{op}: no implementation {request!r}; there are: {', '.join(names)}.")
    passed_over: list[tuple[str, str]] = []
    for impl in implementations:
        if wanted in names and impl.name != wanted:
            passed_over.append((impl.name, f"{wanted} was asked for"))
            continue
        reason = impl.why_not(*args)
        if reason is None and impl.name != wanted:
            reason = impl.not_unasked(*args)
        if reason is None:
            choice = Choice(op, impl.name, impl.function, tuple(passed_over))
            _note(choice.op, choice.name, choice.function, choice.passed_over)
            return choice
        if impl.name == wanted:
            raise KernelUnavailable(f"{op}: {wanted} was asked for and cannot serve: {reason}")
        passed_over.append((impl.name, reason))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise KernelUnavailable(f"{op}: no implementation can serve: {reasons}")


@torch.compiler.assume_constant_result
def _note(op: str, name: str, function: Callable[..., Any], passed_over: tuple[tuple[str, str], ...]) -> None:
    """Record a choice, given as its fields.

    A compiled function does so once, when it is compiled: traced, the record would be an input of the graph,
    and each new entry would compile every graph again.
    """
    _chosen[(op, name)] = Choice(op, name, function, passed_over)


def chosen() -> tuple[Choice, ...]:
    """Return each distinct choice that this process made, in the order of the first use."""
    return tuple(_chosen.values())


def record(choices: Sequence[Choice]) -> None:
    """Set the recorded choices, to look at those of one piece of work apart from the others."""
    _chosen.clear()
    _chosen.update({(choice.op, choice.name): choice for choice in choices})
