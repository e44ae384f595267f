# SPDX-License-Identifier: Apache-2.0
"""choose(): the order of preference, explicit requests, and what is said about what was passed over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from masktrain.kernels import _dispatch
from masktrain.kernels._dispatch import Choice, Implementation, KernelUnavailable, choose, chosen


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(_dispatch.ENV, raising=False)
    before = chosen()
    _dispatch.record(())
    yield
    _dispatch.record(before)


def double(x: Tensor) -> Tensor:
    return 2 * x


def implementation(name: str, reason: str | None = None) -> Implementation:
    return Implementation(name, double, lambda *_: reason)


ALL = (implementation("triton"), implementation("native"), implementation("reference"))
NO_TRITON = (implementation("triton", "no GPU"), *ALL[1:])


def test_the_first_that_serves_is_taken() -> None:
    assert choose("op", ALL) == Choice("op", "triton", double, ())
    assert choose("op", ALL[::-1]).name == "reference"


def test_reasons_of_what_was_passed_over_are_kept_in_order() -> None:
    served = choose("op", (NO_TRITON[0], implementation("native", "not built"), ALL[2]))
    assert served.name == "reference"
    assert served.passed_over == (("triton", "no GPU"), ("native", "not built"))


def test_the_arguments_decide() -> None:
    only_double = Implementation(
        "native", double, lambda x: None if x.dtype == torch.float64 else "float64 only"
    )
    assert choose("op", (only_double, ALL[2]), torch.zeros(1, dtype=torch.float64)).name == "native"
    served = choose("op", (only_double, ALL[2]), torch.zeros(1))
    assert (served.name, served.passed_over) == ("reference", (("native", "float64 only"),))


@pytest.mark.parametrize("name", _dispatch.NAMES)
def test_a_request_is_honoured(name: str) -> None:
    served = choose("op", ALL, request=name)
    assert served.name == name
    assert all(reason == f"{name} was asked for" for _, reason in served.passed_over)


@pytest.mark.parametrize("by_variable", [False, True], ids=["argument", "variable"])
def test_a_request_that_cannot_be_met_raises_its_reason(
    by_variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_variable:
        monkeypatch.setenv(_dispatch.ENV, "triton")
    with pytest.raises(KernelUnavailable, match=r"^op: triton was asked for and cannot serve: no GPU$"):
        choose("op", NO_TRITON, request=None if by_variable else "triton")


def test_a_request_for_what_the_op_does_not_have() -> None:
    with pytest.raises(
        KernelUnavailable, match="op: no implementation 'triton'; there are: native, reference"
    ):
        choose("op", ALL[1:], request="triton")


@pytest.mark.parametrize("value", ["native", " Native ", "NATIVE"])
def test_the_variable_chooses(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_dispatch.ENV, value)
    assert choose("op", ALL).name == "native"


@pytest.mark.parametrize("value", ["", "auto", "AUTO"])
def test_the_variable_may_leave_the_choice(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_dispatch.ENV, value)
    assert choose("op", NO_TRITON).name == "native"


def test_an_argument_wins_over_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_dispatch.ENV, "native")
    assert choose("op", ALL, request="reference").name == "reference"


def test_the_variable_does_not_speak_to_ops_without_that_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_dispatch.ENV, "triton")
    assert choose("op", ALL[1:]).name == "native"


def test_an_unknown_value_of_the_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_dispatch.ENV, "tritn")
    with pytest.raises(
        KernelUnavailable, match="'tritn' is not known; allowed: auto, triton, native, reference"
    ):
        choose("op", ALL)


def test_nothing_serves() -> None:
    with pytest.raises(
        KernelUnavailable, match="op: no implementation can serve: triton: no GPU; native: broken"
    ):
        choose("op", (NO_TRITON[0], implementation("native", "broken")))


def test_choices_are_recorded_once_each_and_can_be_set() -> None:
    first, second = choose("a", ALL), choose("b", NO_TRITON)
    choose("a", ALL)
    assert chosen() == (first, second)
    _dispatch.record((second,))
    assert chosen() == (second,)


def test_choosing_inside_a_compiled_function_records_and_does_not_recompile() -> None:
    def step(x: Tensor) -> Tensor:
        x = choose("first", NO_TRITON, x).function(x)
        return choose("second", NO_TRITON, x).function(x)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [4, 4]
    assert [c.op for c in chosen()] == ["first", "second"]
    choose("third", ALL)
    compiled(torch.ones(2))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
