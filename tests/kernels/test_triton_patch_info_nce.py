# SPDX-License-Identifier: Apache-2.0
"""patch_info_nce in Triton against the reference: values, gradients, isolation, saved memory, dispatch.

On a CUDA device the kernels run there, elsewhere in Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from masktrain.kernels import _triton as support
from masktrain.kernels._testing import check_op
from masktrain.kernels.patch_info_nce import _triton, patch_info_nce
from masktrain.types import cumulative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    support.why_not(torch.empty(0, device=DEVICE)) is not None,
    reason=str(support.why_not(torch.empty(0, device=DEVICE))),
)
AXES = ["targets", "predictions"]
# (tokens of each clip, values of a token), around the 64 x 64 blocks and the 16 and 128 values of the sums.
SHAPES = {
    "short": ((1, 2, 31, 33, 0), 128),
    "long": ((64, 65, 127), 40),
    "odd width": ((20, 5), 33),
    "wide": ((9, 7), 300),
    "narrow": ((6, 70), 2),
    "one token each": ((1, 1, 1), 16),
}


def caller(counts: tuple[int, ...], axis: str, implementation: str):
    """Return a function of pred and target."""
    cu = cumulative(counts, torch.int32, DEVICE)
    return lambda pred, target: patch_info_nce(
        pred, target, cu, counts, axis=axis, implementation=implementation
    )


def inputs(
    counts: tuple[int, ...], width: int, *dtypes: torch.dtype, size: float = 0.5, target_grad: bool = True
) -> list[Tensor]:
    """Return pred and target as strided views between rows and columns of NaN."""
    n = sum(counts)
    generator = torch.Generator().manual_seed(n + width)
    tensors = []
    for dtype in dtypes:
        wide = torch.full((n + 2, width + 3), math.nan)
        wide[1:-1, 1:-2] = size * torch.randn(n, width, generator=generator)
        tensors.append(wide.to(dtype).to(DEVICE)[1:-1, 1:-2].requires_grad_())
    tensors[1].requires_grad_(target_grad)
    return tensors


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("counts", "width"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
    ids=str,
)
def test_against_the_reference(counts, width, dtypes, axis) -> None:
    tensors = inputs(counts, width, *dtypes)
    check_op(caller(counts, axis, "triton"), caller(counts, axis, "reference"), tensors)


@pytest.mark.parametrize("axis", AXES)
def test_large_logits(axis) -> None:
    """Raw patches: logits of some thousands, of which some are nearly all of their softmax."""
    tensors = inputs((70, 30), 128, torch.float32, torch.float32, size=10.0)
    check_op(caller((70, 30), axis, "triton"), caller((70, 30), axis, "reference"), tensors)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("axis", AXES)
def test_logits_far_below_zero(axis) -> None:
    """A column outside the clip has logit 0, whose weight overflows beside a log-sum-exp of -100 unless masked."""
    pred, target = (x.detach() for x in inputs((40, 70), 32, torch.float32, torch.float32))
    tensors = [(pred + 2.0).requires_grad_(), (target - 2.0).requires_grad_()]
    check_op(caller((40, 70), axis, "triton"), caller((40, 70), axis, "reference"), tensors)


@pytest.mark.parametrize("axis", AXES)
def test_same_bits_twice_and_for_one_side_alone(axis) -> None:
    """The two gradients are computed apart, so each is the same without the other."""
    counts = (70, 3)
    both = inputs(counts, 40, torch.float32, torch.float32)
    first = torch.autograd.grad(caller(counts, axis, "triton")(*both), both)
    again = torch.autograd.grad(caller(counts, axis, "triton")(*both), both)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    pred, target = inputs(counts, 40, torch.float32, torch.float32, target_grad=False)
    (alone,) = torch.autograd.grad(caller(counts, axis, "triton")(pred, target), pred)
    assert torch.equal(alone, first[0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("axis", AXES)
def test_clips_do_not_see_each_other(axis) -> None:
    counts = (5, 9, 66)
    tensors = inputs(counts, 24, torch.float32, torch.float32)
    poisoned = [x.detach().clone() for x in tensors]
    for x in poisoned:
        x[:5] = math.nan
        x[14:] = math.nan
        x.requires_grad_()
    clean = torch.autograd.grad(caller(counts, axis, "triton")(*tensors), tensors)
    dirty = torch.autograd.grad(caller(counts, axis, "triton")(*poisoned), poisoned)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[5:14], b[5:14])
        assert b[:5].isnan().all()


@pytest.mark.parametrize("counts", [(), (0, 0)])
def test_nothing_masked(counts) -> None:
    tensors = inputs(counts, 8, torch.float32, torch.float32)
    loss = caller(counts, "targets", "triton")(*tensors)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, tensors)[0].shape == (0, 8)


def test_a_token_by_itself_has_no_negatives() -> None:
    tensors = inputs((1, 1), 40, torch.float32, torch.float32)
    loss = caller((1, 1), "targets", "triton")(*tensors)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, tensors))


def test_saved_memory_is_linear() -> None:
    """pred, target and one number per token."""

    def saved(n: int) -> int:
        numbers: list[int] = []
        tensors = inputs((n, n), 5, torch.float32, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            caller((n, n), "targets", "triton")(*tensors)
        return sum(numbers)

    for n in (10, 160):
        assert saved(n) == 2 * n * (5 + 5 + 1)


def test_large_strides() -> None:
    """Rows so far apart that offsets pass 2^31 bytes; the memory between them is never touched."""
    stride = 2**30 + 16
    flat = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    pred, target = (x.detach() for x in inputs((3,), 16, torch.float16, torch.float16))
    far = flat.as_strided((3, 16), (stride, 1), 0)
    far.copy_(pred)
    results = []
    for x in (far, pred):
        y = target.clone().requires_grad_()
        loss = caller((3,), "targets", "triton")(x, y)
        results.append([loss, *torch.autograd.grad(loss, y)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck_and_one_graph() -> None:
    counts = (6, 18)
    x, y = inputs(counts, 8, torch.float32, torch.float32)
    torch.library.opcheck(torch.ops.masktrain.patch_info_nce_triton.default, (x, y, list(counts)))
    call = caller(counts, "predictions", "triton")
    got, want = torch.compile(call, backend="aot_eager", fullgraph=True)(x, y), call(x, y)
    assert torch.equal(got, want)
    for a, b in zip(torch.autograd.grad(got, (x, y)), torch.autograd.grad(want, (x, y)), strict=True):
        assert torch.equal(a, b)


def test_autocast_does_not_round() -> None:
    tensors = inputs((9, 4), 8, torch.float32, torch.float32)
    plain = caller((9, 4), "targets", "triton")(*tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(caller((9, 4), "targets", "triton")(*tensors), plain)


def test_float64_is_refused_by_name() -> None:
    x = torch.zeros(4, 3, device=DEVICE)
    assert "not float64" in str(_triton.why_not(x, x.double()))
    assert _triton.why_not(x, x.half()) is None
