# SPDX-License-Identifier: Apache-2.0
"""The native mask_scatter: the bits of the reference forward, a deterministic and accurate gradient backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels._dispatch import KernelUnavailable, choose
from masktrain.kernels._testing import check_op, poisoned_memory
from masktrain.kernels.mask_scatter import mask_scatter
from masktrain.kernels.mask_scatter._native import SMALLEST, SUMMED_ROWS
from masktrain.kernels.mask_scatter.op import IMPLEMENTATIONS

pytestmark = pytest.mark.skipif(_native.cpu() is None, reason="no native library")


def problem(n_visible: int, n_masked: int, width: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(n_masked)
    ids = torch.randperm(n_visible + n_masked, generator=g).to(torch.int32)
    return {
        "x_visible": torch.randn(n_visible, width, generator=g).requires_grad_(),
        "mask_token": torch.randn(width, generator=g).requires_grad_(),
        "visible": ids[:n_visible].sort().values,
        "masked": ids[n_visible:].sort().values,
    }


def gradients(arguments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    out = mask_scatter(**arguments, implementation="native")
    directions = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(out, (arguments["x_visible"], arguments["mask_token"]), directions)


def check(arguments: dict[str, Tensor]) -> None:
    native, reference = (
        partial(
            mask_scatter,
            visible=arguments["visible"],
            masked=arguments["masked"],
            implementation=i,
        )
        for i in ("native", "reference")
    )
    x, token = arguments["x_visible"], arguments["mask_token"]
    check_op(native, reference, [x, token])
    with poisoned_memory(), torch.no_grad():
        assert torch.equal(native(x, token), reference(x, token))


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 37))
@settings(max_examples=60, deadline=None)
def test_equals_the_reference(n_visible: int, n_masked: int, width: int) -> None:
    check(problem(n_visible, n_masked, width))


@pytest.mark.parametrize("n_masked", [1, SUMMED_ROWS, SUMMED_ROWS + 1, 5 * SUMMED_ROWS - 1])
@pytest.mark.parametrize("width", [1, 13, 192])
def test_every_instruction_set(n_masked: int, width: int, level: int) -> None:
    arguments = problem(70, n_masked, width)
    check(arguments)
    found = gradients(arguments)
    _native.require().mt_set_cpu_level(0)
    assert all(map(torch.equal, found, gradients(arguments)))


def test_threads_do_not_matter(threads: int) -> None:
    arguments = problem(700, 1900, 67)
    check(arguments)
    found = gradients(arguments)
    torch.set_num_threads(1)
    assert all(map(torch.equal, found, gradients(arguments)))


def test_float64_and_a_float32_mask_token() -> None:
    arguments = problem(5, 9, 7)
    x = arguments["x_visible"].detach().double().requires_grad_()
    arguments["x_visible"] = x
    out = mask_scatter(**arguments, implementation="native")
    assert torch.equal(out, mask_scatter(**arguments, implementation="reference"))
    out.sum().backward()
    token = arguments["mask_token"]
    assert token.grad is not None and token.grad.dtype == torch.float32
    assert torch.equal(token.grad, torch.full((7,), 9.0)) and torch.equal(x.grad, torch.ones(5, 7).double())


def test_gradients_against_finite_differences() -> None:
    arguments = problem(4, 6, 3)
    inputs = [arguments[k].detach().double().requires_grad_() for k in ("x_visible", "mask_token")]
    rest = {"visible": arguments["visible"], "masked": arguments["masked"], "implementation": "native"}
    assert torch.autograd.gradcheck(lambda x, t: mask_scatter(x, t, **rest), inputs)


def test_strided_inputs_and_gradients() -> None:
    arguments = problem(30, 50, 12)
    found = gradients(arguments)
    wide = {k: torch.stack([v.detach(), v.detach()], v.dim())[..., 0] for k, v in arguments.items()}
    assert not wide["x_visible"].is_contiguous()
    wide |= {k: wide[k].requires_grad_() for k in ("x_visible", "mask_token")}
    assert all(map(torch.equal, found, gradients(wide)))
    # a sum hands back one expanded value
    out = mask_scatter(**arguments, implementation="native").sum()
    assert torch.equal(torch.autograd.grad(out, arguments["x_visible"])[0], torch.ones(30, 12))


def test_small_tensors_are_left_to_the_reference_unless_it_is_asked_for() -> None:
    token = torch.zeros(8)
    for n_visible, name in ((SMALLEST // 8 - 1, "reference"), (SMALLEST // 8, "native")):
        x = torch.zeros(n_visible, 8)
        assert choose("mask_scatter", IMPLEMENTATIONS, x, token).name == name
        assert choose("mask_scatter", IMPLEMENTATIONS, x, token, request="native").name == "native"


def test_rows_that_do_not_exist_are_not_written() -> None:
    arguments = problem(3, 2, 4)
    arguments |= {"visible": torch.tensor([0, -1, 2**31 - 1]).int(), "masked": torch.tensor([5, 1]).int()}
    guarded = torch.full((9, 4), 7.0)
    place = guarded[2:7].data_ptr()
    places = [arguments[k].data_ptr() for k in ("x_visible", "mask_token", "visible")]
    masked = arguments["masked"].data_ptr()
    _native.require().mt_mask_scatter(place, *places, 3, masked, 2, 16, 1)
    assert torch.equal(guarded[2], arguments["x_visible"][0])
    assert torch.equal(guarded[3], arguments["mask_token"])
    assert (guarded[[0, 1, 4, 5, 6, 7, 8]] == 7).all()
    directions = torch.ones(5, 4)
    grad_x, grad_token = torch.ops.masktrain.mask_scatter_grad(
        directions, arguments["visible"], arguments["masked"]
    )
    assert torch.equal(grad_x, torch.tensor([1.0, 0, 0])[:, None].expand(3, 4))
    assert torch.equal(grad_token, torch.ones(4))


def test_other_dtypes_are_left_to_others() -> None:
    arguments = problem(4, 6, 3)
    arguments["x_visible"] = arguments["x_visible"].detach().bfloat16()
    with pytest.raises(KernelUnavailable, match=r"float32 or float64, not torch\.bfloat16"):
        mask_scatter(**arguments, implementation="native")
    assert mask_scatter(**arguments).dtype == torch.bfloat16


def test_opcheck() -> None:
    arguments = tuple(problem(5, 9, 7).values())
    torch.library.opcheck(torch.ops.masktrain.mask_scatter.default, arguments)
    grad = (torch.randn(14, 7), *arguments[2:])
    torch.library.opcheck(torch.ops.masktrain.mask_scatter_grad.default, grad)
