# SPDX-License-Identifier: Apache-2.0
"""Dropout and attention dropout: the same bits everywhere, rate and scale, gradients, new masks each step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels._testing import check_op, poisoned_memory
from masktrain.kernels.dropout import attention_keep_padded, dropout
from masktrain.kernels.dropout.reference import keep_scale
from masktrain.kernels.philox import Purpose, host_words

IMPLEMENTATIONS = ["reference"] + (["native"] if _native.cpu() else [])
needs_native = pytest.mark.skipif(_native.cpu() is None, reason="no native library")

SEED = 0xABCD_12345678
SIZES = [
    (0, 8),
    (3, 0),
    (1, 1),
    (5, 7),
    (4, 8),
    (3, 9),
    (2, 127),
    (2, 128),
    (2, 129),
    (3, 1023),
    (2, 1025),
    (40, 768),
]


def key(step: int = 7, seed: int = SEED) -> Tensor:
    return torch.tensor([seed, step])


def rows(n: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Clip ids and positions of n rows, some of them far out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 2**40, (n,), generator=generator)
    return ids, torch.randint(0, 2**33, (n,), generator=generator)


def half(words: list[int], h: int) -> int:
    return words[h // 2] >> (16 * (h % 2)) & 0xFFFF


@pytest.fixture(params=range(3), ids=["base", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each instruction set of the native library that this CPU has."""
    library = _native.cpu()
    if library is None:
        pytest.skip(f"{_native.why_not()}")
    best = library.mt_cpu_level()
    if library.mt_set_cpu_level(request.param) != request.param:
        pytest.skip(f"this CPU has {_native.LEVELS[best]} at most")
    yield request.param
    library.mt_set_cpu_level(best)


# --- which values are dropped


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("width", [1, 8, 13])
def test_every_decision_is_the_half_that_the_definition_names(width: int, implementation: str) -> None:
    p, site, clips, positions = 0.3, 5, (3, 2**32 + 9), (0, 4)
    x = torch.ones(2, width)
    y = dropout(
        x, p, key(), torch.tensor(clips), torch.tensor(positions), site=site, implementation=implementation
    )
    per_row, threshold = math.ceil(width / 8), round(p * 65536)
    for n in range(2):
        words = host_words(SEED, 7, clips[n], 400, purpose=Purpose.DROPOUT, stream=site)
        for d in range(width):
            e = positions[n] * 8 * per_row + d
            dropped = half(words[4 * (e // 8) :], e % 8) < threshold
            expected = 0.0 if dropped else 1 / (1 - threshold / 65536)
            assert float(y[n, d]) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "width"), SIZES)
def test_every_instruction_set_gives_the_reference_bit_for_bit(
    level: int, n: int, width: int, dtype: torch.dtype
) -> None:
    x = torch.randn(n, width, dtype=dtype, generator=torch.Generator().manual_seed(1))
    arguments = (x, 0.25, key(), *rows(n))
    with poisoned_memory():
        native = dropout(*arguments, site=2**32 - 1, implementation="native")
    assert torch.equal(native, dropout(*arguments, site=2**32 - 1, implementation="reference"))


@needs_native
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 6),
    width=st.integers(0, 40),
    p=st.floats(0, 0.999),
    seed=st.integers(0, 2**48 - 1),
    step=st.integers(0, 2**32 - 1),
    site=st.integers(0, 2**32 - 1),
    ids=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**40),
)
def test_implementations_agree_on_any_input(
    n: int, width: int, p: float, seed: int, step: int, site: int, ids: int, position: int
) -> None:
    x = torch.arange(1.0, n * width + 1).reshape(n, width)
    row_ids = torch.full((n,), ids)
    arguments = (x, p, key(step, seed), row_ids, torch.arange(n) + position)
    native, reference = (dropout(*arguments, site=site, implementation=i) for i in ("native", "reference"))
    assert torch.equal(native, reference)


@needs_native
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(300, 100)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = dropout(x, 0.1, key(), *rows(300), site=1, implementation="native")
            keep = attention_keep_padded(
                (90, 70), 3, 0.1, key(), torch.arange(2), site=1, implementation="native"
            )
            results.append((y, keep))
    finally:
        torch.set_num_threads(before)
    for y, keep in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(keep, results[0][1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_row_depends_on_nothing_but_its_own_key(implementation: str) -> None:
    """Any subset of rows in any order, as another rank or micro-batch has them, and any strides."""
    x = torch.randn(20, 30)
    ids, positions = rows(20)
    whole = dropout(x, 0.4, key(), ids, positions, site=3, implementation=implementation)
    pick = torch.tensor([17, 2, 2, 9])
    part = dropout(x[pick], 0.4, key(), ids[pick], positions[pick], site=3, implementation=implementation)
    assert torch.equal(part, whole[pick])
    strided = dropout(
        x.T.contiguous().T[::3], 0.4, key(), ids[::3], positions[::3], site=3, implementation=implementation
    )
    assert torch.equal(strided, whole[::3])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_another_step_site_clip_or_position_has_another_mask(implementation: str) -> None:
    x, one = torch.ones(1, 256), torch.ones(1, dtype=torch.int64)

    def mask(step: int = 0, seed: int = 0, clip: int = 0, position: int = 0, site: int = 0) -> bytes:
        y = dropout(
            x, 0.5, key(step, seed), clip * one, position * one, site=site, implementation=implementation
        )
        return bytes((y != 0).flatten().tolist())

    masks = {
        mask(),
        mask(step=1),
        mask(seed=1),
        mask(seed=2**32),
        mask(clip=1),
        mask(position=1),
        mask(site=1),
    }
    assert len(masks) == 7


def test_p_zero_returns_x() -> None:
    x = torch.randn(3, 5)
    assert dropout(x, 0.0, key(), *rows(3), site=0) is x
    assert dropout(x, 2.0**-18, key(), *rows(3), site=0) is x


# --- how many, and by what they are scaled


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("p", [1 / 65536, 0.1, 0.5, 0.9, 0.999])
def test_rate_and_scale(p: float, implementation: str) -> None:
    x = torch.ones(4000, 100)
    y = dropout(
        x, p, key(), torch.arange(4000) // 50, torch.arange(4000) % 50, site=9, implementation=implementation
    )
    share = round(p * 65536) / 65536
    dropped = int((y == 0).sum())
    z = (dropped - x.numel() * share) / math.sqrt(x.numel() * share * (1 - share))
    assert abs(z) < 4.5
    kept = y[y != 0]
    assert bool((kept == torch.tensor(1 / (1 - share), dtype=torch.float32)).all())
    mean_z = (float(y.double().mean()) - 1) / math.sqrt(share / (1 - share) / x.numel())
    assert abs(mean_z) < 4.5


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_neighbours_are_independent(implementation: str) -> None:
    """Along a row, along positions of a clip, and across clips."""
    keep = (
        dropout(
            torch.ones(64 * 64, 128),
            0.5,
            key(),
            torch.arange(64).repeat_interleave(64),
            torch.arange(64).repeat(64),
            site=2,
            implementation=implementation,
        )
        .view(64, 64, 128)
        .sign()
        .double()
        .mul(2)
        .sub(1)
    )
    for axis in range(3):
        a = keep.narrow(axis, 1, keep.shape[axis] - 1)
        b = keep.narrow(axis, 0, keep.shape[axis] - 1)
        assert abs(float((a * b).sum()) / math.sqrt(a.numel())) < 4.5


def test_what_is_dropped_is_zero_whatever_it_was() -> None:
    for implementation in IMPLEMENTATIONS:
        ones = dropout(torch.ones(9, 40), 0.5, key(), *rows(9), site=0, implementation=implementation)
        bad = torch.full((9, 40), torch.nan)
        y = dropout(bad, 0.5, key(), *rows(9), site=0, implementation=implementation)
        assert torch.equal(y.isnan(), ones != 0) and bool((y[ones == 0] == 0).all())


# --- gradients


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_forward_and_backward_use_the_same_mask(implementation: str) -> None:
    x = torch.randn(50, 33, requires_grad=True)
    y = dropout(x, 0.3, key(), *rows(50), site=4, implementation=implementation)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad * x, y) and 0 < int((grad == 0).sum()) < x.numel()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("n", [0, 4])
def test_gradcheck(n: int, implementation: str) -> None:
    x = torch.randn(n, 11, dtype=torch.float64, requires_grad=True)

    def op(x: Tensor) -> Tensor:
        return dropout(x, 0.4, key(), *rows(n), site=4, implementation=implementation)

    assert torch.autograd.gradcheck(op, x) and torch.autograd.gradgradcheck(op, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "width"), SIZES)
def test_as_accurate_as_the_reference(n: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()

    def run(implementation: str | None):  # type: ignore[no-untyped-def]
        return lambda x: dropout(x, 0.3, key(), *rows(n), site=4, implementation=implementation)

    check_op(run(None), run("reference"), [x])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_of_the_size_of_x_is_saved(implementation: str) -> None:
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        x = torch.randn(64, 512, requires_grad=True)
        dropout(x, 0.3, key(), *rows(64), site=4, implementation=implementation)
    assert 0 < sum(sizes) <= 8 * (64 + 64 + 2)


# --- attention


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_multiplier_is_the_half_that_the_definition_names(implementation: str) -> None:
    lengths, heads, p, site, clips = (5, 9), 2, 0.3, 65535, (3, 2**32 + 9)
    keep = attention_keep_padded(
        lengths,
        heads,
        p,
        key(),
        torch.tensor(clips),
        site=site,
        dtype=torch.float64,
        implementation=implementation,
    )
    assert keep.shape == (2, 2, 9, 9)
    threshold = round(p * 65536)
    for b, n in enumerate(lengths):
        assert not keep[b, :, n:].any() and not keep[b, :, :, n:].any()
        for h in range(heads):
            words = host_words(
                SEED, 7, clips[b], 200, purpose=Purpose.ATTENTION_DROPOUT, stream=site * 65536 + h
            )
            for i in range(n):
                for j in range(n):
                    e = i * 8 * math.ceil(n / 8) + j
                    dropped = half(words[4 * (e // 8) :], e % 8) < threshold
                    assert float(keep[b, h, i, j]) == (0 if dropped else 65536 / (65536 - threshold))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [(), (0,), (1,), (16, 16), (3, 0, 17, 65), (1030, 2)], ids=str)
def test_attention_bits_of_every_instruction_set(
    level: int, lengths: tuple[int, ...], dtype: torch.dtype
) -> None:
    clips = torch.arange(len(lengths)) * 2**31 + 5
    options = {"site": 65535, "dtype": dtype}
    with poisoned_memory():
        padded = attention_keep_padded(lengths, 3, 0.2, key(), clips, **options, implementation="native")
    expected = attention_keep_padded(lengths, 3, 0.2, key(), clips, **options, implementation="reference")
    assert padded.dtype == dtype and torch.equal(padded, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_bits_do_not_depend_on_the_other_clips(implementation: str) -> None:
    options = {"site": 1, "implementation": implementation}
    together = attention_keep_padded((7, 20), 2, 0.5, key(), torch.tensor([4, 5]), **options)
    alone = attention_keep_padded((7,), 2, 0.5, key(), torch.tensor([4]), **options)
    assert torch.equal(together[0, :, :7, :7], alone[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_rate_scale_and_new_bits(implementation: str) -> None:
    options = {"dtype": torch.float64, "implementation": implementation}
    clips = torch.arange(4)
    keep = attention_keep_padded((100,) * 4, 6, 0.1, key(), clips, site=1, **options)
    share = round(0.1 * 65536) / 65536
    z = (int((keep == 0).sum()) - keep.numel() * share) / math.sqrt(keep.numel() * share * (1 - share))
    assert abs(z) < 4.5
    assert keep.unique().tolist() == [0, keep_scale(6554)]
    assert len({bytes((m != 0).flatten().tolist()) for m in keep.flatten(0, 1)}) == 24
    for other in (
        attention_keep_padded((100,) * 4, 6, 0.1, key(8), clips, site=1, **options),
        attention_keep_padded((100,) * 4, 6, 0.1, key(), clips, site=2, **options),
    ):
        assert not torch.equal(keep, other)
    everything = attention_keep_padded((3,), 2, 0.0, key(), clips[:1], site=1, **options)
    assert bool((everything == 1).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_multipliers_in_low_precision_are_rounded_ones(dtype: torch.dtype) -> None:
    arguments = ((5, 9), 2, 0.3, key(), torch.arange(2))
    wide = attention_keep_padded(*arguments, site=1, dtype=torch.float64)
    assert torch.equal(attention_keep_padded(*arguments, site=1, dtype=dtype), wide.to(dtype))


# --- torch.library and torch.compile


@needs_native
@pytest.mark.parametrize("n", [0, 5])
def test_opcheck(n: int) -> None:
    x = torch.randn(n, 13, requires_grad=True)
    torch.library.opcheck(torch.ops.masktrain.dropout.default, (x, 20000, key(), *rows(n), 4))
    arguments = ((3, n), 2, 20000, key(), torch.arange(2), 4, torch.float32)
    torch.library.opcheck(torch.ops.masktrain.attention_keep_padded.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_step_has_new_masks_each_step_without_recompiling(implementation: str) -> None:
    ids, positions = rows(6)

    def step(x: Tensor, counter: Tensor) -> tuple[Tensor, Tensor]:
        x = dropout(torch.tanh(x), 0.5, counter, ids, positions, site=1, implementation=implementation)
        keep = attention_keep_padded((4, 9), 2, 0.5, counter, ids[:2], site=1, implementation=implementation)
        return x, keep

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # What Inductor makes of the reference is tested with the words themselves; here it would take 10 s.
    backend = "inductor" if implementation == "native" else "aot_eager"
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    x = torch.randn(6, 24, requires_grad=True)
    masks, keeps = set(), set()
    for number in range(3):
        y, keep = compiled(x, key(number))
        expected, expected_keep = step(x, key(number))
        torch.testing.assert_close(y, expected)
        assert torch.equal(y == 0, expected == 0) and torch.equal(keep, expected_keep)
        (grad,) = torch.autograd.grad(y.sum(), x)
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(grad, expected_grad)
        masks.add(tuple((y != 0).flatten().tolist()))
        keeps.add(tuple((keep != 0).flatten().tolist()))
    assert len(masks) == len(keeps) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- what is refused


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x must have shape"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be float"),
        ({"counter": torch.zeros(2)}, TypeError, "counter must be int64"),
        ({"row_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "row_ids must have shape"),
        ({"row_pos": torch.zeros(2, dtype=torch.int32)}, TypeError, "row_pos must be int64"),
        ({"row_pos": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "row_pos must be on cpu"),
        ({"p": 1.0}, ValueError, "p must lie in"),
        ({"p": 1 - 2.0**-18}, ValueError, "p must lie in"),
        ({"p": -0.1}, ValueError, "p must lie in"),
        ({"p": math.nan}, ValueError, "p must lie in"),
        ({"site": -1}, ValueError, "site must lie in"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], match: str) -> None:
    ids, positions = rows(2)
    arguments = {
        "x": torch.zeros(2, 3),
        "p": 0.1,
        "counter": key(),
        "row_ids": ids,
        "row_pos": positions,
        "site": 0,
    }
    with pytest.raises(error, match=f"dropout: {match}"):
        dropout(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lengths": [3, 4]}, TypeError, "lengths must be a tuple"),
        ({"lengths": (3,)}, ValueError, "lengths must hold one number"),
        ({"lengths": (3, -1)}, ValueError, "lengths must hold numbers >= 0"),
        ({"heads": 0}, ValueError, "heads must be at least 1"),
        ({"heads": 65537}, ValueError, "heads must lie in"),
        ({"site": 65536}, ValueError, "site must lie in"),
        ({"p": 1.0}, ValueError, "p must lie in"),
        ({"clip_ids": torch.zeros(2)}, TypeError, "clip_ids must be int64"),
        ({"dtype": torch.int32}, TypeError, "dtype must be"),
    ],
)
def test_wrong_arguments_of_attention_are_named(change: dict, error: type[Exception], match: str) -> None:
    arguments = {
        "lengths": (3, 4),
        "heads": 2,
        "p": 0.1,
        "counter": key(),
        "clip_ids": torch.arange(2),
        "site": 0,
    }
    with pytest.raises(error, match=f"attention_keep_padded: {match}"):
        attention_keep_padded(**(arguments | change))


@needs_native
def test_native_says_what_it_does_not_serve() -> None:
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"native was asked for and cannot serve: .* float32 and float64"):
        dropout(x, 0.1, key(), *rows(2), site=0, implementation="native")
