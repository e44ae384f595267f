# SPDX-License-Identifier: Apache-2.0
"""varlen_attention: each form against the float64 definition, gradients, dropout bits, memory, arguments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels.philox import Purpose, host_words
from masktrain.kernels.varlen_attention import _native, varlen_attention
from masktrain.types import cumulative

SHAPES = {
    "equal": (7, 7, 7),
    "mixed": (5, 1, 13, 8, 13),
    "one token": (1, 1),
    "single": (17,),
    "clip without rows": (3, 0, 9),
    "all without rows": (0, 0),
    "no clips": (),
}


def inputs(
    lengths: tuple[int, ...], heads: int, width: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3, heads, width, generator=generator, dtype=torch.float64).to(dtype)
    return list(qkv.unbind(1))


def run(
    tensors: list[Tensor], lengths: tuple[int, ...], p: float, implementation: str, weight: Tensor
) -> list[Tensor]:
    """Return the output and the gradients of q, k, v for the slope `weight`."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = varlen_attention(
        *leaves,
        cumulative(lengths, torch.int32, "cpu"),
        lengths,
        dropout_p=p,
        counter=torch.tensor([2**40 + 3, 11]),
        clip_ids=torch.arange(len(lengths)) * 7 + 2,
        site=5,
        implementation=implementation,
    )
    out.backward(weight.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]


def assert_close_to_truth(got: list[Tensor], baseline: list[Tensor], truth: list[Tensor]) -> None:
    """Error at most twice the reference's in the same dtype plus one rounding of the truth, in both norms.

    In float64 the reference is the truth: there the error is a few roundings.
    """
    assert len(got) == len(truth) == 4
    for g, b, t in zip(got, baseline, truth, strict=True):
        assert g.dtype == b.dtype and g.shape == t.shape
        for order in (math.inf, 2):
            size = torch.linalg.vector_norm(t, order) if t.numel() else torch.tensor(0.0)
            error, allowed = (
                torch.linalg.vector_norm(x.double() - t, order) if t.numel() else torch.tensor(0.0)
                for x in (g, b)
            )
            roundings = 8 if g.dtype == torch.float64 else 1
            assert error <= 2 * allowed + roundings * torch.finfo(g.dtype).eps * size


@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_native_against_truth(lengths: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    tensors = inputs(lengths, 3, 8, dtype)
    weight = inputs(lengths, 3, 8, dtype, seed=1)[0]
    truth = run([t.double() for t in tensors], lengths, p, "reference", weight.double())
    assert_close_to_truth(
        run(tensors, lengths, p, "native", weight), run(tensors, lengths, p, "reference", weight), truth
    )


@pytest.mark.parametrize("padding", [0.0, 0.25, 1.0])
def test_padded_form_against_truth(padding: float) -> None:
    """The form of GPUs without packed attention, and the explicit one with padding, as both run there."""
    lengths = (50, 1, 0, 130, 80, 130, 40)
    tensors = inputs(lengths, 2, 16, torch.float32)
    weight = inputs(lengths, 2, 16, torch.float32, seed=1)[0]
    truth = run([t.double() for t in tensors], lengths, 0.0, "reference", weight.double())
    baseline = run(tensors, lengths, 0.0, "reference", weight)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = _native.padded(*leaves, lengths, padding)
    out.backward(weight)
    assert_close_to_truth([out.detach(), *(t.grad for t in leaves if t.grad is not None)], baseline, truth)


@pytest.mark.parametrize("padding", [0.25, 1.0])
@pytest.mark.parametrize("most", [1, 300, 1 << 20])
def test_explicit_form_with_padding(monkeypatch: pytest.MonkeyPatch, padding: float, most: int) -> None:
    monkeypatch.setitem(_native.MAX_PADDING, "cpu", padding)
    monkeypatch.setitem(_native.MAX_WEIGHTS, "cpu", most)
    lengths = (5, 1, 0, 13, 8, 13, 4)
    tensors = inputs(lengths, 2, 8, torch.float64)
    weight = inputs(lengths, 2, 8, torch.float64, seed=1)[0]
    got = run(tensors, lengths, 0.3, "native", weight)
    for g, t in zip(got, run(tensors, lengths, 0.3, "reference", weight), strict=True):
        assert torch.allclose(g, t, rtol=0, atol=1e-13)


def test_definition_by_hand() -> None:
    """Two clips by loops over plain numbers, dropout bits from plain integers."""
    lengths, heads, width, site, p = (3, 10), 2, 4, 9, 0.25
    q, k, v = inputs(lengths, heads, width, torch.float64)
    seed, step, ids = 77, 4, (123, 9)
    got = varlen_attention(
        q,
        k,
        v,
        cumulative(lengths, torch.int32, "cpu"),
        lengths,
        dropout_p=p,
        counter=torch.tensor([seed, step]),
        clip_ids=torch.tensor(ids),
        site=site,
        implementation="reference",
    )
    start = 0
    for clip, n in enumerate(lengths):
        row = 8 * math.ceil(n / 8)
        for h in range(heads):
            words = host_words(
                seed,
                step,
                ids[clip],
                n * row // 2,
                purpose=Purpose.ATTENTION_DROPOUT,
                stream=site * 65536 + h,
            )
            for i in range(n):
                logits = [float(q[start + i, h] @ k[start + j, h]) / 2 for j in range(n)]
                total = sum(math.exp(x) for x in logits)
                want = torch.zeros(width, dtype=torch.float64)
                for j in range(n):
                    e = i * row + j
                    half = (words[e // 2] >> (16 * (e % 2))) & 0xFFFF
                    if half >= round(p * 65536):
                        want += math.exp(logits[j]) / total / (1 - p) * v[start + j, h]
                assert torch.allclose(got[start + i, h], want, rtol=0, atol=1e-12)
        start += n


@pytest.mark.parametrize("lengths", [(4, 4), (5, 1, 3)])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_gradcheck(lengths: tuple[int, ...], p: float, implementation: str) -> None:
    leaves = [t.clone().requires_grad_() for t in inputs(lengths, 2, 4, torch.float64)]
    key = {"counter": torch.tensor([1, 2]), "clip_ids": torch.arange(len(lengths))}
    cu = cumulative(lengths, torch.int32, "cpu")

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, cu, lengths, dropout_p=p, **key, implementation=implementation)

    assert torch.autograd.gradcheck(call, leaves)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6).map(tuple),
    p=st.sampled_from([0.0, 0.2]),
    order=st.randoms(use_true_random=False),
)
def test_a_clip_does_not_depend_on_its_batch(lengths: tuple[int, ...], p: float, order) -> None:
    """The same clips in another order, and each alone, give the same rows."""
    tensors = inputs(lengths, 2, 8, torch.float64)
    ids = torch.tensor([3 * b + 1 for b in range(len(lengths))])
    counter = torch.tensor([5, 6])

    def call(places: list[int]) -> tuple[Tensor, ...]:
        sizes = tuple(lengths[b] for b in places)
        parts = [torch.cat([t.split(lengths)[b] for b in places]) for t in tensors]
        cu = cumulative(sizes, torch.int32, "cpu")
        return varlen_attention(*parts, cu, sizes, dropout_p=p, counter=counter, clip_ids=ids[places]).split(
            sizes
        )

    places = list(range(len(lengths)))
    whole = call(places)
    shuffled = places.copy()
    order.shuffle(shuffled)
    for b, rows in zip(shuffled, call(shuffled), strict=True):
        assert torch.allclose(rows, whole[b], rtol=0, atol=1e-13)
    for b in places:
        assert torch.allclose(call([b])[0], whole[b], rtol=0, atol=1e-13)


@pytest.mark.parametrize("lengths", [(40,) * 6, (40, 3, 25, 40, 1)])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_same_bits_twice_and_strided_input(lengths: tuple[int, ...], p: float) -> None:
    """A second run gives the same bits; views into wider rows (as of a fused projection) give the same."""
    tensors = inputs(lengths, 4, 16, torch.float32)
    weight = inputs(lengths, 4, 16, torch.float32, seed=1)[0]
    first = run(tensors, lengths, p, "native", weight)
    assert all(
        torch.equal(a, b) for a, b in zip(first, run(tensors, lengths, p, "native", weight), strict=True)
    )
    wide = torch.full((sum(lengths), 3, 4, 40), math.nan)
    views = [wide[:, i, :, 8:24] for i in range(3)]
    for view, t in zip(views, tensors, strict=True):
        view.copy_(t)
    for view in views:
        view.requires_grad_()
    out = varlen_attention(
        *views,
        cumulative(lengths, torch.int32, "cpu"),
        lengths,
        dropout_p=p,
        counter=torch.tensor([2**40 + 3, 11]),
        clip_ids=torch.arange(len(lengths)) * 7 + 2,
        site=5,
    )
    grads = torch.autograd.grad(out, views, weight)
    for g, t in zip([out, *grads], first, strict=True):
        assert torch.allclose(g, t, rtol=1e-5, atol=1e-6)


def test_dropout_rate_and_scale() -> None:
    """With equal logits and v of ones, a row's output is its kept weights / n / (1 - p)."""
    n, heads, p = 200, 4, 0.1
    lengths = (n, n)
    zeros = torch.zeros(2 * n, heads, 4)
    out = varlen_attention(
        zeros,
        zeros,
        torch.ones_like(zeros),
        cumulative(lengths, torch.int32, "cpu"),
        lengths,
        dropout_p=p,
        counter=torch.tensor([0, 0]),
        clip_ids=torch.arange(2),
    )[..., 0]
    draws = out.numel() * n
    assert abs(out.mean() - 1) < 4 * math.sqrt(p / (1 - p) / draws)
    assert out.var() == pytest.approx(p / (1 - p) / n, rel=0.15)
    by_head = out.view(2, n, heads).transpose(1, 2).flatten(0, 1)
    assert len({tuple(row.tolist()) for row in by_head}) == 2 * heads


def test_site_step_and_clip_change_the_bits() -> None:
    lengths = (12,)
    q, k, v = inputs(lengths, 1, 8, torch.float32)
    cu = cumulative(lengths, torch.int32, "cpu")

    def call(seed: int = 1, step: int = 1, clip: int = 1, site: int = 1) -> Tensor:
        key = {"counter": torch.tensor([seed, step]), "clip_ids": torch.tensor([clip]), "site": site}
        return varlen_attention(q, k, v, cu, lengths, dropout_p=0.5, **key)

    base = call()
    assert torch.equal(base, call())
    for other in ({"seed": 2}, {"step": 2}, {"clip": 2}, {"site": 2}):
        assert not torch.equal(base, call(**other))


def test_saved_bytes_grow_linearly() -> None:
    """Nothing of n x n is saved for backward, with dropout and without."""

    def saved(n: int, p: float) -> int:
        leaves = [t.requires_grad_() for t in inputs((n,) * 3, 2, 8, torch.float32)]
        held: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: (held.__setitem__(t.data_ptr(), t.numel() * t.element_size()), t)[1], lambda t: t
        ):
            varlen_attention(
                *leaves,
                cumulative((n,) * 3, torch.int32, "cpu"),
                (n,) * 3,
                dropout_p=p,
                counter=torch.tensor([0, 0]),
                clip_ids=torch.arange(3),
                implementation="native",
            )
        return sum(held.values())

    for p in (0.0, 0.1):
        assert saved(256, p) < 2.5 * saved(128, p)


def test_groups_bound_what_is_held() -> None:
    """Every clip once, no group above the limit unless it is one clip, padding within its share."""
    lengths = (9, 0, 4, 9, 30, 5, 9, 4, 28, 1)
    for padding in (0.0, 0.3):
        groups = _native.groups(lengths, 2, torch.device("cpu"), most=2 * 9 * 9 * 2, padding=padding)
        assert sorted(c for g in groups for c in g.clips) == [b for b, n in enumerate(lengths) if n]
        for g in groups:
            area = len(g.clips) * g.n**2
            assert area * 2 <= 2 * 9 * 9 * 2 or len(g.clips) == 1
            assert sum(n * n for n in g.lengths) >= (1 - padding) * area


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "width", "lengths", "p", "want"),
    [
        ("cuda", torch.bfloat16, (9, 0), 64, (5, 6), 0.0, "varlen"),
        ("cuda", torch.float16, (8, 0), 64, (5, 6), 0.0, "varlen"),
        ("cuda", torch.float16, (7, 0), 64, (5, 6), 0.0, "padded"),
        ("cuda", torch.float32, (9, 0), 64, (5, 6), 0.0, "padded"),
        ("cuda", torch.bfloat16, (9, 0), 20, (5, 6), 0.0, "padded"),
        ("cuda", torch.bfloat16, (9, 0), 64, (6, 6), 0.0, "sdpa"),
        ("cuda", torch.bfloat16, (9, 0), 64, (5, 6), 0.1, "explicit"),
        ("cpu", torch.bfloat16, (0, 0), 64, (5, 6), 0.0, "split"),
    ],
)
def test_form(device, dtype, capability, width, lengths, p, want) -> None:
    chosen, why = _native.form(device, dtype, capability, width, lengths, p)
    assert chosen == want and why


def test_packed_attention_of_torch_takes_our_call() -> None:
    """The call cannot run without a GPU; its signature must still fit."""
    import inspect

    from torch.nn.attention.varlen import varlen_attn

    bound = inspect.signature(varlen_attn).bind(*"qkvcc", 1, 1)
    assert list(bound.arguments)[3:] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.mark.parametrize("lengths", [(30, 7), (30, 30)])
@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_autocast_does_not_round(lengths: tuple[int, ...], implementation: str, p: float) -> None:
    tensors = inputs(lengths, 2, 8, torch.float32)

    def call() -> Tensor:
        key = {"counter": torch.tensor([0, 0]), "clip_ids": torch.arange(2)}
        cu = cumulative(lengths, torch.int32, "cpu")
        return varlen_attention(*tensors, cu, lengths, dropout_p=p, **key, implementation=implementation)

    plain = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(), plain)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"q": torch.zeros(5, 2, 8, dtype=torch.int32)}, TypeError, "q must be"),
        ({"k": torch.zeros(5, 2, 7)}, ValueError, r"k must have shape \(5, 2, 8\)"),
        ({"v": torch.zeros(5, 2, 8, dtype=torch.float64)}, TypeError, "v must be float32"),
        ({"lengths": (2, 2)}, ValueError, "add up to the 5 rows of q, received 4"),
        ({"cu": torch.zeros(4, dtype=torch.int32)}, ValueError, "cu must have shape"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must lie in \[0, 1\), received 1.0"),
        ({"dropout_p": 1 - 1e-9}, ValueError, "below 1"),
        ({"dropout_p": 0.1}, ValueError, "needs counter and clip_ids"),
        ({"site": 65536}, ValueError, "site must lie"),
        (
            {"dropout_p": 0.1, "counter": torch.zeros(2), "clip_ids": torch.arange(2)},
            TypeError,
            "counter must be int64",
        ),
    ],
)
def test_bad_arguments(change: dict, error: type[Exception], words: str) -> None:
    good = {
        "q": torch.zeros(5, 2, 8),
        "k": torch.zeros(5, 2, 8),
        "v": torch.zeros(5, 2, 8),
        "cu": torch.tensor([0, 2, 5], dtype=torch.int32),
        "lengths": (2, 3),
    }
    with pytest.raises(error, match=words):
        varlen_attention(**{**good, **change})
