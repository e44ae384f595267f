# SPDX-License-Identifier: Apache-2.0
"""select_tokens and block_marks in Triton: the reference, bit for bit, on a GPU or interpreted."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.block_marks import block_marks
from masktrain.kernels.select_tokens import select_tokens
from masktrain.kernels.select_tokens._triton import MOST_TOKENS, smallest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _triton.why_not(torch.zeros(0, device=DEVICE))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def arguments(n_tokens: tuple[int, ...], counts: tuple[int, ...], seed: int = 0) -> tuple:
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32, device=DEVICE)
    key = torch.tensor([2**47 + seed, 7], device=DEVICE)
    return cu, n_tokens, counts, key, torch.randint(0, 2**40, (len(n_tokens),), generator=g).to(DEVICE)


def assert_selects_the_same(
    n_tokens: tuple[int, ...], n_visible: tuple[int, ...], seed: int = 0, **options
) -> None:
    keys = arguments(n_tokens, n_visible, seed)
    with poisoned_memory():
        ours = select_tokens(*keys, **options, implementation="triton")
    for mine, expected in zip(ours, select_tokens(*keys, **options, implementation="reference"), strict=True):
        assert mine.dtype == torch.int32 and torch.equal(mine, expected)


@st.composite
def clips(draw: st.DrawFn, multiple: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n_tokens = tuple(multiple * n for n in draw(st.lists(st.integers(0, 40), min_size=1, max_size=4)))
    return n_tokens, tuple(draw(st.integers(0, n)) for n in n_tokens)


@settings(max_examples=25, deadline=None)
@given(clips(), st.sampled_from([None, 1, 3, 255, 2**30 - 1]), st.integers(0, 2**20))
def test_selects_what_the_reference_selects(counts, largest_class: int | None, seed: int) -> None:
    n_tokens, n_visible = counts
    classes = None
    if largest_class is not None:
        g = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, largest_class + 1, (sum(n_tokens),), generator=g).to(DEVICE)
        classes = classes.to(torch.uint8 if largest_class < 256 else torch.int32)
    assert_selects_the_same(n_tokens, n_visible, seed, classes=classes)


@pytest.mark.parametrize(
    ("n_tokens", "n_visible"),
    [((), ()), ((0, 0), (0, 0)), ((1,) * 9, (1, 0) * 4 + (1,)), ((512,) * 3, (128,) * 3), ((2050,), (1000,))],
    ids=["no clip", "no token", "one-token clips", "equal", "long"],
)
def test_selects_at_the_edges(n_tokens: tuple[int, ...], n_visible: tuple[int, ...]) -> None:
    assert_selects_the_same(n_tokens, n_visible)


def test_selects_with_shared_words_strided_classes_and_wide_ones() -> None:
    assert_selects_the_same((40,) * 3, (10,) * 3, shared=True)
    wide = torch.randint(0, 3, (160,), device=DEVICE)
    assert_selects_the_same((50, 30), (20, 7), classes=wide[::2])


tl = _triton.tl


@_triton.jit
def threshold_kernel(out_ptr, key_ptr, count, LENGTH: tl.constexpr):
    """out: the count-th smallest of LENGTH keys of 8 bits."""
    tl.store(out_ptr, smallest(tl.load(key_ptr + tl.arange(0, LENGTH)), count, 8))


def test_the_count_th_smallest_among_equal_keys() -> None:
    """Equal words are too rare to be met in a clip."""
    key = torch.randint(0, 5, (64,), device=DEVICE)
    for count in (1, 2, 30, 64, 65):
        out = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        threshold_kernel[(1,)](out, key, count, LENGTH=64)
        assert out.item() == (int(key.sort().values[count - 1]) if count <= 64 else 2**8 - 1)


def assert_marks_the_same(
    n_tokens: tuple[int, ...], n_marked: tuple[int, ...], seed: int = 0, **options
) -> None:
    keys = arguments(n_tokens, n_marked, seed)
    with poisoned_memory():
        ours = block_marks(*keys, **options, implementation="triton")
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, block_marks(*keys, **options, implementation="reference"))


@settings(max_examples=40, deadline=None)
@given(
    clips(4),
    st.sampled_from(["time", "freq"]),
    st.sampled_from(["clipped", "wrap"]),
    st.sampled_from(["random", "first"]),
    st.booleans(),
    st.sampled_from([(3, 4, 5), (2,), (1, 6)]),
    st.integers(0, 2**20),
)
def test_marks_what_the_reference_marks(counts, order, growth, truncation, spare_first, sides, seed) -> None:
    options = {"order": order, "growth": growth, "truncation": truncation, "spare_first": spare_first}
    assert_marks_the_same(*counts, seed, freq=4, sides=sides, **options)


@pytest.mark.parametrize("growth", ["clipped", "wrap"])
def test_marks_at_the_edges(growth: str) -> None:
    options = {"freq": 8, "order": "time", "growth": growth}
    assert_marks_the_same((), (), **options)
    assert_marks_the_same((0, 0), (0, 0), **options)
    assert_marks_the_same((8, 8), (8, 8), **options)
    assert_marks_the_same((512, 512), (384, 384), shared=True, **options)
    assert_marks_the_same((1,) * 5, (0, 1, 0, 1, 1), **options | {"freq": 1})


def assert_clamped_the_same(
    n_tokens: tuple[int, ...], blocks: tuple[int, ...], seed: int = 0, **options
) -> None:
    cu, _, _, key, ids = arguments(n_tokens, blocks, seed)
    options = {"growth": "clamped", "blocks": blocks, **options}
    with poisoned_memory():
        ours = block_marks(cu, n_tokens, None, key, ids, **options, implementation="triton")
    assert ours.dtype == torch.uint8
    expected = block_marks(cu, n_tokens, None, key, ids, **options, implementation="reference")
    assert torch.equal(ours, expected)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)), min_size=1, max_size=4),
    st.sampled_from(["time", "freq"]),
    st.sampled_from([1, 2, 5, 9]),
    st.integers(0, 2**20),
)
def test_clamped_marks_what_the_reference_marks(clips, order: str, side: int, seed: int) -> None:
    n_tokens, blocks = tuple(4 * n for n, _ in clips), tuple(k for _, k in clips)
    assert_clamped_the_same(n_tokens, blocks, seed, freq=4, order=order, sides=(side,))


def test_clamped_marks_at_the_edges() -> None:
    options = {"freq": 8, "order": "time", "sides": (5,)}
    assert_clamped_the_same((), (), **options)
    assert_clamped_the_same((0, 0), (2, 2), **options)
    assert_clamped_the_same((8, 8), (0, 0), **options)
    assert_clamped_the_same((512, 512), (5, 5), shared=True, **options)
    assert_clamped_the_same((1600, 2400), (5, 9), **options)
    assert_clamped_the_same((1,) * 5, (0, 1, 0, 1, 1), **options | {"freq": 1})


def test_compiled_step_selects_anew_each_step_without_recompiling() -> None:
    cu, n_tokens, n_visible, _, ids = arguments((12, 8), (4, 3))

    def step(key: Tensor) -> tuple[Tensor, Tensor]:
        marks = block_marks(cu, n_tokens, (5, 3), key, ids, freq=4, order="time", implementation="triton")
        return select_tokens(cu, n_tokens, n_visible, key, ids, classes=marks, implementation="triton")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, seen = torch.compile(step, fullgraph=True, backend="aot_eager"), set()
    for number in range(3):
        key = torch.tensor([5, number], device=DEVICE)
        visible, masked = compiled(key)
        expected = step(key)
        assert torch.equal(visible, expected[0]) and torch.equal(masked, expected[1])
        seen.add(tuple(visible.tolist()))
    assert len(seen) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_opcheck() -> None:
    cu, n_tokens, counts, key, ids = arguments((12, 8), (4, 3))
    ops = torch.ops.masktrain
    torch.library.opcheck(
        ops.select_tokens_triton.default, (cu, n_tokens, counts, key, ids, None, None, True, False, 1)
    )
    torch.library.opcheck(
        ops.block_marks_triton.default,
        (cu, n_tokens, counts, key, ids, 4, True, (2, 3), False, False, False, False, 1),
    )
    torch.library.opcheck(
        ops.clamped_blocks_triton.default, (cu, n_tokens, counts, key, ids, 4, True, 3, False, 1)
    )


def test_says_what_it_does_not_serve() -> None:
    with pytest.raises(
        KernelUnavailable, match=f"clips of at most {MOST_TOKENS} tokens, not {MOST_TOKENS + 1}"
    ):
        select_tokens(*arguments((MOST_TOKENS + 1,), (5,)), implementation="triton")
    with pytest.raises(KernelUnavailable, match=f"clips of at most {MOST_TOKENS} tokens"):
        block_marks(*arguments((MOST_TOKENS + 1,), (5,)), freq=1, order="time", implementation="triton")
