# SPDX-License-Identifier: Apache-2.0
"""window_attention: the reference against a plain loop over windows and heads, the native library against the
reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from masktrain.kernels import _native as library
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import check_op
from masktrain.kernels.window_attention import _native, reference, window_attention

needs_native = pytest.mark.skipif(library.cpu() is None, reason=str(library.why_not()))
# heads, head width, largest window, rows of the windows
SHAPES = {
    "full": (8, 8, 16, [16] * 9),
    "ragged": (16, 32, 16, [8, 16, 16, 8, 4, 12, 1]),
    "width 40": (24, 40, 16, [16, 3]),
    "width 100": (20, 100, 12, [12, 5, 9]),
    "small": (5, 16, 4, [4, 1, 2]),
    "one row": (3, 2, 16, [1]),
    "empty": (2, 4, 16, []),
}


def inputs(shape: str, dtype: torch.dtype = torch.float64, gradients: bool = True) -> list[Tensor]:
    heads, width, most, sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(len(shape))
    qkv = torch.randn(sum(sizes), 3, heads, width, generator=generator, dtype=dtype)
    tau = torch.rand(heads, generator=generator, dtype=dtype) + 0.3
    bias = torch.randn(heads, most, most, generator=generator, dtype=dtype)
    cu = torch.tensor([0, *sizes]).cumsum(0).int()
    return [*(t.requires_grad_(gradients) for t in (qkv, tau, bias)), cu]


def plain(qkv: Tensor, tau: Tensor, bias: Tensor, cu: Tensor) -> Tensor:
    """Every number by itself."""
    out = torch.zeros(qkv.shape[0], *qkv.shape[2:], dtype=qkv.dtype)
    for first, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        for head in range(qkv.shape[2]):
            for i in range(first, end):
                scores = []
                for j in range(first, end):
                    q, k = qkv[i, 0, head], qkv[j, 1, head]
                    length = max(math.sqrt(float(q @ q)) * math.sqrt(float(k @ k)), 1e-6)
                    tau_used = max(float(tau[head]), 0.01)
                    scores.append(float(q @ k) / length / tau_used + float(bias[head, i - first, j - first]))
                least = max(scores)
                weights = [math.exp(s - least) for s in scores]
                for j, weight in enumerate(weights):
                    out[i, head] += weight / sum(weights) * qkv[first + j, 2, head]
    return out


@pytest.mark.parametrize("shape", ["ragged", "small", "one row", "full"])
def test_reference_is_the_definition(shape: str) -> None:
    arguments = inputs(shape, gradients=False)
    assert torch.allclose(reference.window_attention(*arguments), plain(*arguments), rtol=0, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("native", marks=needs_native)])
def test_tau_and_norms_have_a_least_value(implementation: str) -> None:
    """tau below 0.01 counts as 0.01 and has no gradient; queries of 0 and tiny ones are finite."""
    qkv, tau, bias, cu = inputs("small", gradients=False)
    tau[0], tau[1] = 0.004, -1.0
    qkv[0, 0, 2], qkv[1, :2, 3] = 0.0, 1e-5
    arguments = [t.requires_grad_() for t in (qkv, tau, bias)]
    out = window_attention(*arguments, cu, implementation=implementation)
    assert torch.allclose(out, plain(qkv.detach(), tau.detach(), bias.detach(), cu), rtol=0, atol=1e-12)
    out.square().sum().backward()
    assert tau.grad is not None and tau.grad[:2].tolist() == [0, 0] and (tau.grad[2:] != 0).all()
    for t in arguments:
        assert t.grad is not None and torch.isfinite(t.grad).all()


@pytest.mark.parametrize("implementation", ["reference", pytest.param("native", marks=needs_native)])
@pytest.mark.parametrize("shape", ["small", "one row"])
def test_gradients_by_differences(shape: str, implementation: str) -> None:
    *arguments, cu = inputs(shape)
    assert torch.autograd.gradcheck(
        lambda *x: window_attention(*x, cu, implementation=implementation), arguments, atol=1e-7
    )


@needs_native
@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_native_is_the_reference(shape: str, level: int) -> None:
    """As accurate in float32, equal to rounding in float64, for each instruction set."""
    used = library.require().mt_set_cpu_level(level)
    try:
        if used != level:
            pytest.skip(f"this CPU has no {library.LEVELS[level]}")
        # without fused multiply-adds, and over as few values as tau has, the largest error fluctuates
        check_op(
            _native.window_attention, reference.window_attention, inputs(shape, torch.float32), slack=2.0
        )
        results = []
        for function in (_native.window_attention, reference.window_attention):
            *arguments, cu = inputs(shape)
            out = function(*arguments, cu)
            along = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            results.append([out, *torch.autograd.grad(out, arguments, along)])
        for ours, theirs in zip(*results, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
    finally:
        library.require().mt_set_cpu_level(2)


@needs_native
def test_native_threads_agree() -> None:
    """Values of a window do not depend on the threads; sums over windows only to rounding. Enough rows for threads."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1024, 3, 4, 8, generator=generator, requires_grad=True)
    tau, bias = torch.ones(4, requires_grad=True), torch.zeros(4, 16, 16, requires_grad=True)
    cu = torch.arange(0, 1025, 16).int()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = _native.window_attention(qkv, tau, bias, cu)
            found.append([out, *torch.autograd.grad(out.square().sum(), (qkv, tau, bias))])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
        for ours, theirs in zip(other[2:], found[0][2:], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", pytest.param("native", marks=needs_native)])
def test_not_a_number_stays(implementation: str) -> None:
    """NaN in a key reaches every row of its window and no other window."""
    qkv, tau, bias, cu = inputs("ragged", torch.float32, gradients=False)
    qkv[9, 1] = math.nan
    out = window_attention(qkv, tau, bias, cu, implementation=implementation)
    wrong = out.isnan().flatten(1).any(1)
    assert wrong[8:24].all() and not wrong[:8].any() and not wrong[24:].any()


@needs_native
def test_opcheck() -> None:
    arguments = inputs("ragged", torch.float32)
    torch.library.opcheck(torch.ops.masktrain.window_attention.default, arguments)
    grad = torch.randn(len(arguments[0]), 16, 32)
    still = [t.detach() for t in arguments]
    torch.library.opcheck(torch.ops.masktrain.window_attention_grad.default, (grad, *still))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype: torch.dtype) -> None:
    """Scores and softmax are float32 whatever the rows are; also under autocast."""
    qkv, tau, bias, cu = inputs("ragged", torch.float32, gradients=False)
    low = qkv.to(dtype)
    want = reference.window_attention(low.double(), tau.double(), bias.double(), cu)
    with torch.autocast("cpu", torch.bfloat16):
        out = window_attention(low, tau, bias, cu)
    assert out.dtype == dtype
    assert float((out.double() - want).abs().max()) < 40 * torch.finfo(dtype).eps


@needs_native
def test_strided_rows() -> None:
    arguments = inputs("ragged", torch.float32, gradients=False)
    wide = torch.zeros(*arguments[0].shape[:-1], 64)
    wide[..., ::2] = arguments[0]
    out = window_attention(wide[..., ::2], *arguments[1:], implementation="native")
    assert torch.equal(out, window_attention(*arguments, implementation="native"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({0: torch.zeros(3, 2, 5, 16)}, ValueError, r"qkv must have shape \(N, 3, H, Dh\)"),
        ({0: torch.zeros(3, 3, 5, 16, dtype=torch.int32)}, TypeError, "qkv must be"),
        ({1: torch.zeros(4)}, ValueError, r"tau must have shape \(5,\)"),
        ({2: torch.zeros(5, 4, 3)}, ValueError, "bias must be square"),
        ({2: torch.zeros(5, 4, 4, dtype=torch.float64)}, TypeError, "bias must be float32"),
        ({3: torch.zeros(4, dtype=torch.int64)}, TypeError, "cu must be int32"),
        ({3: torch.zeros(0, dtype=torch.int32)}, ValueError, "cu must have shape"),
    ],
)
def test_wrong_arguments(change: dict[int, Tensor], error: type[Exception], words: str) -> None:
    arguments = inputs("small", torch.float32, gradients=False)
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(error, match=words):
        window_attention(*arguments)


@needs_native
def test_what_native_does_not_serve() -> None:
    for qkv, most, words in (
        (torch.zeros(2, 3, 1, 200), 16, "heads of at most 128"),
        (torch.zeros(2, 3, 1, 8), 20, "windows of at most 16"),
        (torch.zeros(2, 3, 1, 8, dtype=torch.bfloat16), 16, "float32 or in float64"),
    ):
        arguments = (qkv, torch.ones(1), torch.zeros(1, most, most), torch.tensor([0, 2]).int())
        assert window_attention(*arguments).shape == (2, 1, qkv.shape[3])
        with pytest.raises(KernelUnavailable, match=words):
            window_attention(*arguments, implementation="native")
