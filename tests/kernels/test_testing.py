# SPDX-License-Identifier: Apache-2.0
"""The accuracy check itself: it lets correct kernels pass and catches wrong ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from masktrain.kernels._testing import assert_accurate, check_op, poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reference(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Gather rows, scale them, and append their mean."""
    rows = x[index] * weight
    return torch.cat([rows, rows.mean(0, keepdim=True)])


def fused(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """Another order of the same operations, into memory of its own, in float32 as a kernel would."""
    rows = x.float().index_select(0, index) * weight.float()
    out = torch.empty((len(index) + 1, x.shape[1]), dtype=x.dtype)
    out[:-1] = rows
    out[-1] = rows.sum(0) / len(index)
    return out


def off_by_one(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    return reference(x, weight, torch.cat([index[:-1], (index[-1:] + 1) % len(x)]))


def unmasked_tail(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    out = fused(x, weight, index)
    padded = torch.cat([x[index] * weight, x[:1]])
    return torch.cat([out[:-1], padded.sum(0, keepdim=True) / len(index)])


def missing_term(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    rows = x[index] * weight
    return torch.cat([rows, rows[1:].sum(0, keepdim=True) / len(index)])


def unwritten_row(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    out = torch.empty((len(index) + 1, x.shape[1]), dtype=x.dtype)
    out[:-1] = x[index] * weight
    return out


def one_wrong_value(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    out = reference(x, weight, index)
    return torch.cat([out[:-1], out[-1:] + torch.eye(1, x.shape[1], dtype=x.dtype) * 0.1])


def blurred(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """No value is far off, but all are off."""
    out = reference(x, weight, index)
    return out * (1 + 4 * torch.finfo(x.dtype).eps)


class WrongGradient(torch.autograd.Function):
    """The right output, with a term missing from the gradient of `weight`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, index)
        return reference(x, weight, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        x, weight, index = ctx.saved_tensors
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            gx, gw = torch.autograd.grad(reference(x, weight, index), (x, weight), grad)
        return gx, gw - grad[0] * x[index[0]], None


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(37, 19, generator=generator).to(dtype).requires_grad_()
    weight = torch.rand(19, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(0, 37, (23,), generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", [reference, fused], ids=lambda k: k.__name__)
def test_correct_kernels_pass(kernel: Callable[..., Tensor], dtype: torch.dtype) -> None:
    check_op(kernel, reference, case(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kernel",
    [off_by_one, unmasked_tail, missing_term, unwritten_row, one_wrong_value, blurred, WrongGradient.apply],
    ids=[
        "off_by_one",
        "unmasked_tail",
        "missing_term",
        "unwritten_row",
        "one_wrong_value",
        "blurred",
        "gradient",
    ],
)
def test_wrong_kernels_are_caught(kernel: Callable[..., Tensor], dtype: torch.dtype) -> None:
    with pytest.raises(
        AssertionError, match="output 0" if kernel != WrongGradient.apply else "gradient of input 1"
    ):
        check_op(kernel, reference, case(dtype))


def test_each_norm_catches_what_the_other_does_not() -> None:
    truth = torch.ones(10_000, dtype=torch.float64)
    plain = truth.float()
    plain[0] += 1e-3
    spread = truth.float() + 1e-3  # no larger an error than that of the reference, but everywhere
    with pytest.raises(AssertionError, match="2-norm"):
        assert_accurate(spread, plain, truth)
    many = truth.float() + 1e-3
    single = truth.float()
    single[0] += 5e-3  # a smaller 2-norm, but one value is far off
    with pytest.raises(AssertionError, match="largest error"):
        assert_accurate(single, many, truth)


def test_nan_infinity_shape_and_dtype_fail() -> None:
    truth = torch.ones(4, dtype=torch.float64)
    plain = truth.float()
    for wrong in (plain * torch.nan, plain / 0):
        with pytest.raises(AssertionError, match="largest error"):
            assert_accurate(wrong, plain, truth)
    with pytest.raises(AssertionError, match="shape"):
        assert_accurate(plain[:3], plain, truth)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_accurate(plain.bfloat16(), plain, truth)
    with pytest.raises(AssertionError, match="not finite"):
        assert_accurate(plain, plain, truth / 0)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_accurate(plain, plain, plain)


def test_integers_must_be_equal() -> None:
    assert_accurate(torch.tensor([1, 2]), torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(AssertionError, match="differs"):
        assert_accurate(torch.tensor([1, 3]), torch.tensor([1, 2]), torch.tensor([1, 2]))


def test_empty_passes() -> None:
    empty = torch.empty(0, 3)
    assert_accurate(empty, empty, empty.double())


def test_poisoned_memory_fills_and_restores() -> None:
    def made() -> list[Tensor]:
        x = torch.zeros(3)
        return [torch.empty(1000), torch.empty_like(x), x.new_empty(7), torch.empty_strided((2, 2), (2, 1))]

    assert not torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        assert all(bool(t.isnan().all()) for t in made())
        assert bool((torch.empty(5, dtype=torch.int32) == torch.iinfo(torch.int32).max).all())
    assert not torch.are_deterministic_algorithms_enabled()
