# SPDX-License-Identifier: Apache-2.0
"""varlen_attention in Triton against the reference: values, gradients, the very dropout bits, isolation, dispatch.

On a CUDA device the kernels run there, elsewhere in Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from masktrain.kernels import _triton as support
from masktrain.kernels._testing import check_op
from masktrain.kernels.varlen_attention import _triton, reference, varlen_attention
from masktrain.types import cumulative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    support.why_not(torch.empty(0, device=DEVICE)) is not None,
    reason=str(support.why_not(torch.empty(0, device=DEVICE))),
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (lengths, heads, head width): lengths around the tiles' 16, 32 and 64 rows, widths that fill a block and that do not.
SHAPES = {
    "short": ((1, 2, 31, 33, 8), 2, 32),
    "long": ((64, 0, 65, 127), 1, 64),
    "odd width": ((5, 40), 3, 20),
    "wide": ((17, 65), 1, 128),
    "one row each": ((1, 1), 2, 8),
}


def keys(clips: int) -> dict[str, object]:
    """A counter and ids that use all bits they may have."""
    return {
        "counter": torch.tensor([2**48 - 5, 2**32 - 1], device=DEVICE),
        "clip_ids": torch.arange(clips, device=DEVICE) * 2**31 + 2**33 + 7,
        "site": 65535,
    }


def caller(lengths: tuple[int, ...], p: float, implementation: str):
    """Return a function of q, k, v."""
    cu = cumulative(lengths, torch.int32, DEVICE)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(
            q, k, v, cu, lengths, dropout_p=p, **keys(len(lengths)), implementation=implementation
        )

    return call


def inputs(
    lengths: tuple[int, ...], heads: int, width: int, dtype: torch.dtype, size: float = 1.0
) -> list[Tensor]:
    """Return q, k, v as strided views of one projection, between rows and columns of NaN."""
    n = sum(lengths)
    generator = torch.Generator().manual_seed(n)
    wide = torch.full((n + 2, 3, heads, width + 3), math.nan, dtype=torch.float64)
    wide[1:-1, ..., 1:-2] = size * torch.randn(n, 3, heads, width, generator=generator, dtype=torch.float64)
    return [x.requires_grad_() for x in wide.to(dtype).to(DEVICE)[1:-1, ..., 1:-2].unbind(1)]


@needs_triton
@pytest.mark.parametrize(("lengths", "heads", "width"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_reference(lengths, heads, width, p, dtype) -> None:
    tensors = inputs(lengths, heads, width, dtype)
    check_op(caller(lengths, p, "triton"), caller(lengths, p, "reference"), tensors)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_and_flat_weights(dtype) -> None:
    """Scores of up to some tens, whose largest moves from block to block, and scores of nearly 0."""
    for size in (2.0, 1e-3):
        tensors = inputs((70, 130), 1, 16, dtype, size)
        check_op(caller((70, 130), 0.0, "triton"), caller((70, 130), 0.0, "reference"), tensors)


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_scores_far_below_zero() -> None:
    """A column outside the clip has score 0, whose weight overflows beside a log-sum-exp of -300 unless masked.

    A log-sum-exp of that size is itself rounded by 1e-5, and the weights with it.
    """
    lengths, results = (40, 70), []
    q, k, v = (x.detach() for x in inputs(lengths, 1, 16, torch.float32))
    for implementation in ("triton", "reference"):
        tensors = [x.clone().requires_grad_() for x in (q + 9.0, k - 9.0, v)]
        out = caller(lengths, 0.0, implementation)(*tensors)
        results.append([out, *torch.autograd.grad(out, tensors, v)])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-3 * want.abs().max()


@needs_triton
@pytest.mark.parametrize(
    ("lengths", "heads", "dtype"),
    [((1, 9, 33, 64), 2, torch.float32), ((8, 127), 1, torch.float16)],
    ids=["short", "long"],
)
def test_dropout_bits_are_those_of_the_reference(lengths, heads, dtype) -> None:
    """With equal scores the output for v = unit vectors shows each kept weight, and so does dv in backward."""
    width, p, n_rows = 64, 0.3, sum(lengths)
    zeros = torch.zeros(n_rows, heads, width, dtype=dtype, device=DEVICE)
    row = torch.cat([torch.arange(n) for n in lengths]).to(DEVICE)
    key = keys(len(lengths))
    kept = [
        reference.keep_factors(n, heads, p, key["counter"], key["clip_ids"][b : b + 1], site=key["site"]) > 0
        for b, n in enumerate(lengths)
    ]
    for first in range(0, max(lengths), width):
        units = (row[:, None] == first + torch.arange(width, device=DEVICE)).to(dtype)
        v = units[:, None, :].repeat(1, heads, 1).requires_grad_()
        out = caller(lengths, p, "triton")(zeros, zeros, v)
        (dv,) = torch.autograd.grad(out, v, v.detach())
        for b, (rows, slopes) in enumerate(zip(out.split(lengths), dv.split(lengths), strict=True)):
            n = min(width, lengths[b] - first)
            if n > 0:
                # Both as (head, query, key): columns of out are keys, columns of dv are queries.
                assert torch.equal(rows.permute(1, 0, 2)[..., :n] > 0, kept[b][..., first : first + n])
                assert torch.equal(slopes.permute(1, 2, 0)[:, :n] > 0, kept[b][:, first : first + n])


@needs_triton
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_same_bits_twice(p) -> None:
    lengths = (70, 1, 40)
    runs = []
    for _ in range(2):
        tensors = inputs(lengths, 2, 32, torch.float16)
        out = caller(lengths, p, "triton")(*tensors)
        runs.append([out, *torch.autograd.grad(out, tensors, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@needs_triton
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_clip_sees_neither_its_neighbours_nor_its_place() -> None:
    """NaN in the other clips changes nothing, and a clip gives the same bits alone, given its id."""
    lengths, p = (40, 9, 34), 0.2
    tensors = inputs(lengths, 1, 32, torch.float32)
    poisoned = [x.detach().clone() for x in tensors]
    for x in poisoned:
        x[:40] = math.nan
        x[49:] = math.nan
        x.requires_grad_()
    results = []
    for leaves in (tensors, poisoned):
        out = caller(lengths, p, "triton")(*leaves)
        results.append([x[40:49] for x in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out)))])
    alone = [x.detach()[40:49].requires_grad_() for x in tensors]
    key = keys(3)
    out = varlen_attention(
        *alone,
        cumulative((9,), torch.int32, DEVICE),
        (9,),
        dropout_p=p,
        counter=key["counter"],
        clip_ids=key["clip_ids"][1:2],
        site=key["site"],
        implementation="triton",
    )
    results.append([out, *torch.autograd.grad(out, alone, torch.ones_like(out))])
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@needs_triton
def test_large_strides() -> None:
    """Rows so far apart that offsets pass 2^31 bytes; the memory between them is never touched."""
    lengths, stride = (3,), 2**30 + 16
    flat = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    near = inputs(lengths, 2, 16, torch.float16)
    views = [flat.as_strided((3, 2, 16), (stride, 16, 1), 0), *(x.detach() for x in near[1:])]
    views[0].copy_(near[0].detach())
    got = caller(lengths, 0.2, "triton")(*views)
    assert torch.equal(got, caller(lengths, 0.2, "triton")(*near))


@needs_triton
@pytest.mark.parametrize("lengths", [(), (0, 0)])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_nothing_to_do(lengths, p) -> None:
    tensors = inputs(lengths, 2, 8, torch.float32)
    out = caller(lengths, p, "triton")(*tensors)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert out.shape == grads[0].shape == (0, 2, 8)


@needs_triton
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_saved_bytes_are_linear(p) -> None:
    """q, k, v, the output, one log-sum-exp per row and head, and the two keys of dropout."""

    def saved(n: int) -> int:
        held: dict[int, int] = {}
        tensors = inputs((n, n), 2, 8, torch.float32)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (held.__setitem__(t.data_ptr(), t.numel() * 4), t)[1], lambda t: t
        ):
            caller((n, n), p, "triton")(*tensors)
        return sum(held.values())

    for n in (10, 70):
        assert saved(n) - (2 + 2) * 4 * (p > 0) == 2 * n * 2 * (4 * 8 + 1) * 4


@needs_triton
def test_opcheck() -> None:
    lengths = [5, 18]
    tensors = inputs(tuple(lengths), 2, 8, torch.float32)
    key = keys(2)
    for arguments in (
        (*tensors, lengths, 20000, key["counter"], key["clip_ids"], 3),
        (*tensors, lengths, 0, None, None, 0),
    ):
        torch.library.opcheck(torch.ops.masktrain.varlen_attention_triton.default, arguments)


@needs_triton
def test_a_compiled_step_draws_anew() -> None:
    lengths = (12, 5)
    q, k, v = (x.detach() for x in inputs(lengths, 1, 8, torch.float32))
    cu, ids = cumulative(lengths, torch.int32, DEVICE), torch.arange(2, device=DEVICE)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    def call(counter: Tensor) -> Tensor:
        return varlen_attention(
            q, k, v, cu, lengths, dropout_p=0.5, counter=counter, clip_ids=ids, implementation="triton"
        )

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    counters = [torch.tensor([3, step], device=DEVICE) for step in (0, 1)]
    results = [compiled(c) for c in counters]
    assert not torch.equal(*results)
    assert all(torch.equal(r, call(c)) for r, c in zip(results, counters, strict=True))
    assert len(graphs) == 1


@needs_triton
def test_autocast_does_not_round() -> None:
    tensors = inputs((9, 4), 2, 8, torch.float32)
    plain = caller((9, 4), 0.1, "triton")(*tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(caller((9, 4), 0.1, "triton")(*tensors), plain)


@needs_triton
def test_what_it_does_not_take() -> None:
    for shape, dtype, words in (
        ((4, 2, 8), torch.float64, "takes float16 or bfloat16 or float32, not float64"),
        ((4, 2, 256), torch.float32, "head widths up to 128, not 256"),
    ):
        reason = _triton.why_not(torch.zeros(shape, dtype=dtype, device=DEVICE), 6554)
        assert reason is not None and words in reason


def test_serves_unasked_only_for_dropout_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 8)
    monkeypatch.setattr(support, "INTERPRETED", False)
    assert _triton.not_unasked(q, 6554) is None
    assert "not yet measured" in str(_triton.not_unasked(q, 0))
    monkeypatch.setattr(support, "INTERPRETED", True)
    assert "asked for by name" in str(_triton.not_unasked(q, 6554))
