# SPDX-License-Identifier: Apache-2.0
"""select_tokens with scores: a weighted sample without replacement, and the largest scores; the same everywhere."""

from __future__ import annotations

from decimal import Decimal, localcontext
from itertools import accumulate, combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native, _triton
from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.philox import Purpose, host_words
from masktrain.kernels.select_tokens import select_tokens
from masktrain.kernels.select_tokens.reference import LOG2, score_keys

SEED, STEP = 2**47 + 5, 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = _triton.why_not(torch.zeros(0, device=DEVICE))
NAMES = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.cpu() is None, reason="no native library")),
    pytest.param("triton", marks=pytest.mark.skipif(TRITON is not None, reason=str(TRITON))),
]
ODD = [
    0.0,
    -0.0,
    -1.0,
    float("nan"),
    float("inf"),
    -float("inf"),
    1e-45,
    1e-40,
    2.0**-40,
    2.0**40,
    3e38,
    1e-12,
    1.0,
]


def call(
    n_tokens: list[int], n_visible: list[int], scores: Tensor, *, ids: list[int] | None = None,
    classes: Tensor | None = None, implementation: str = "reference", **options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    device = DEVICE if implementation == "triton" else "cpu"
    places = (
        torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32), tuple(n_tokens), tuple(n_visible),
        torch.tensor([SEED, STEP]), torch.tensor(ids if ids is not None else range(len(n_tokens)), dtype=torch.int64),
    )  # fmt: skip
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in places]
    classes = None if classes is None else classes.to(device)
    with poisoned_memory():
        found = select_tokens(
            *moved, classes=classes, scores=scores.to(device), implementation=implementation, **options
        )
    assert all(t.dtype == torch.int32 for t in found)
    return found[0].cpu(), found[1].cpu()


def expected(
    n_tokens: list[int], n_visible: list[int], scores: Tensor, ids: list[int], classes: Tensor | None,
    *, sample: bool, shared: bool, stream: int,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """By a sort of plain Python keys, clip by clip."""
    visible, masked, start = [], [], 0
    for n, k, clip in zip(n_tokens, n_visible, ids, strict=True):
        own = scores[start : start + n]
        words = torch.tensor(
            host_words(SEED, STEP, 0 if shared else clip, n, purpose=Purpose.MASK, stream=stream)
        ).long()
        keys = score_keys(own, words if sample else None).tolist()
        kinds = [0] * n if classes is None else classes[start : start + n].tolist()
        order = sorted(range(n), key=lambda t: (-kinds[t], -keys[t], t))
        masked += sorted(start + t for t in order[: n - k])
        visible += sorted(start + t for t in order[n - k :])
        start += n
    return visible, masked


def odd_scores(n: int, seed: int, share: float) -> Tensor:
    """Scores over 20 decades, of which a share is replaced by the odd ones, and some are repeated."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.uniform(-23, 23, n)).astype(np.float32)
    values = np.where(rng.random(n) < share, rng.choice(np.array(ODD, dtype=np.float32), n), values)
    return torch.from_numpy(np.where(rng.random(n) < 0.2, np.float32(0.25), values).astype(np.float32))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], Tensor, list[int], Tensor | None, dict]:
    n_tokens = draw(st.lists(st.integers(0, 40), max_size=4))
    shared = draw(st.booleans()) and len(n_tokens) > 0
    if shared:
        n_tokens = [n_tokens[0]] * len(n_tokens)
    n_visible = [draw(st.integers(0, n)) for n in n_tokens]
    if shared:
        n_visible = [n_visible[0]] * len(n_tokens)
    ids = [draw(st.integers(0, 2**33)) for _ in n_tokens]
    seed, total = draw(st.integers(0, 2**20)), sum(n_tokens)
    scores = odd_scores(total, seed, draw(st.sampled_from([0.0, 0.3, 1.0])))
    top = draw(st.sampled_from([None, (torch.uint8, 255), (torch.int32, 2), (torch.int64, 2**30 - 1)]))
    classes = None
    if top is not None:
        g = torch.Generator().manual_seed(seed)
        classes = torch.randint(0, 2, (total,), generator=g).to(top[0]) * top[1]
    options = {
        "sample": draw(st.booleans()),
        "shared": shared,
        "stream": draw(st.sampled_from([0, 1, 2**32 - 1])),
    }
    return n_tokens, n_visible, scores, ids, classes, options


@pytest.mark.parametrize("name", NAMES)
def test_masks_the_largest_keys(name: str) -> None:
    @given(batches())
    @settings(max_examples=25 if name == "triton" else 120, deadline=None)
    def check(batch: tuple) -> None:
        n_tokens, n_visible, scores, ids, classes, options = batch
        visible, masked = call(
            n_tokens, n_visible, scores, ids=ids, classes=classes, implementation=name, **options
        )
        want = expected(n_tokens, n_visible, scores, ids, classes, **options)
        assert (visible.tolist(), masked.tolist()) == want

    check()


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.99, 1.0])
def test_every_instruction_set(share: float, sample: bool, level: int) -> None:
    sizes = [0, 1, 2, 3, 4, 5, 24, 25, 31, 32, 33, 127, 129, 512, 4097]
    n_visible = [int(n * share) for n in sizes]
    scores = odd_scores(sum(sizes), level, 0.1)
    found = (call(sizes, n_visible, scores, sample=sample, implementation=i) for i in ("native", "reference"))
    assert all(map(torch.equal, *found))


def test_threads(threads: int) -> None:
    if _native.cpu() is None:
        pytest.skip(f"{_native.why_not()}")
    sizes = [512] * 130 + [7, 0, 300]
    scores = odd_scores(sum(sizes), 3, 0.0)
    found = (call(sizes, [n // 4 for n in sizes], scores, implementation=i) for i in ("native", "reference"))
    assert all(map(torch.equal, *found))


def exact_log2(value: Decimal) -> Decimal:
    return value.ln() / Decimal(2).ln()


def test_the_table_is_the_nearest_integers() -> None:
    """Further from a tie than any library's logarithm errs: so every machine has the same table."""
    with localcontext(prec=40):
        for i, entry in enumerate(LOG2.tolist()):
            away = abs(exact_log2(1 + Decimal(i) / 1024) * 2**26 - entry)
            assert away < Decimal("0.4999")


def test_keys_are_the_logarithms() -> None:
    """log2 score - log2(-log2 u) to 1e-6, but where u is near 1 to 3e-7 / -log2 u, and everywhere to 4e-4."""
    rng = np.random.default_rng(0)
    words = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2**22, 2**32 - 1025, 2**32 - 2, 2**32 - 1]
    words += rng.integers(0, 2**32, 300).tolist() + rng.integers(2**32 - 2**22, 2**32, 50).tolist()
    scores = np.exp(rng.uniform(-27, 27, len(words))).astype(np.float32)
    scores[:4] = 2.0**-40, 2.0**40, 1.0, np.nextafter(np.float32(2), np.float32(0))
    keys = score_keys(torch.from_numpy(scores), torch.tensor(words)).tolist()
    with localcontext(prec=40):
        for word, score, key in zip(words, scores.tolist(), keys, strict=True):
            u = (2 * Decimal(word) + 1) / 2**33
            wait = -exact_log2(u)
            truth = exact_log2(Decimal(score)) - exact_log2(wait)
            allowed = Decimal("1e-6") + min(Decimal("4e-4"), Decimal("3e-7") / wait)
            assert abs(Decimal(key) / 2**26 - 48 - truth) < allowed
            assert 0 < key < 2**33


def test_keys_grow_with_score_and_with_word() -> None:
    scores = torch.cat([torch.linspace(0.9, 1.1, 5000), torch.logspace(-12.1, 12.1, 5000)]).sort().values
    words = (
        torch.cat([torch.arange(3000), 2**32 - 1 - torch.arange(3000), torch.arange(0, 2**32, 1 << 20)])
        .sort()
        .values
    )
    by_score = score_keys(scores, torch.full((10000,), 123456789))
    assert (by_score.diff() >= 0).all() and by_score.unique().numel() > 9000
    by_word = score_keys(torch.ones(len(words)), words)
    assert (by_word.diff() >= 0).all()


def test_odd_scores_count_as_the_ends_of_the_range() -> None:
    word = torch.full((1,), 987654321)
    low, high = (int(score_keys(torch.tensor([x]), word)) for x in (2.0**-40, 2.0**40))
    for value in (0.0, -0.0, -1.0, float("nan"), -float("nan"), -float("inf"), 1e-45, 1e-13):
        assert int(score_keys(torch.tensor([value]), word)) == low
    for value in (float("inf"), 3e38, 2e12):
        assert int(score_keys(torch.tensor([value]), word)) == high


def inclusion(weights: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the float64 probabilities that a sequential draw of `count` without replacement holds each token, each pair.

    The probability of a set is the sum over the token that was drawn last.
    """
    n, weights = len(weights), weights / weights.sum()
    of_set = {frozenset[int](): 1.0}
    for _ in range(count):
        larger: dict[frozenset[int], float] = {}
        for drawn, p in of_set.items():
            left = 1.0 - sum(weights[i] for i in drawn)
            for i in set(range(n)) - drawn:
                larger[drawn | {i}] = larger.get(drawn | {i}, 0.0) + p * weights[i] / left
        of_set = larger
    single, pairs = np.zeros(n), np.zeros((n, n))
    for drawn, p in of_set.items():
        single[list(drawn)] += p
        for i, j in combinations(sorted(drawn), 2):
            pairs[i, j] += p
    return single, pairs


@pytest.mark.parametrize("name", ["reference", NAMES[1]])
@pytest.mark.parametrize(("count", "spread"), [(1, 1.0), (4, 0.5), (4, 2.5), (7, 1.0)])
def test_sampled_in_proportion_to_the_scores(name: str, count: int, spread: float) -> None:
    n, draws = 9, 20000
    weights = np.exp(spread * np.random.default_rng(4).standard_normal(n)).astype(np.float32)
    scores = torch.from_numpy(weights).repeat(draws)
    _, masked = call([n] * draws, [n - count] * draws, scores, implementation=name)
    rows = torch.zeros(draws, n).scatter_(1, (masked % n).long().view(draws, count), 1.0).double()
    assert (rows.sum(1) == count).all()
    single, pairs = inclusion(weights.astype(np.float64), count)
    together = (rows.T @ rows).numpy()
    for found, p in [*zip(rows.sum(0).tolist(), single, strict=True)] + [
        (together[i, j], pairs[i, j]) for i, j in combinations(range(n), 2)
    ]:
        assert abs(found - draws * p) <= 4.5 * np.sqrt(draws * p * (1 - p)) + 1e-6 * draws


@pytest.mark.parametrize("name", ["reference", NAMES[1]])
def test_rates_of_the_published_sampler(name: str, golden_dir: Path) -> None:
    """Weights of real clips, 133 of 190 tokens masked: the rates of torch.multinomial there, within sampling error."""
    if not (golden_dir / "masking" / "A_dwm.npz").is_file():
        pytest.skip("no masking/A_dwm.npz in the golden data")
    golden = np.load(golden_dir / "masking" / "A_dwm.npz")
    n, k, draws = 190, 57, 2000
    theirs = int(golden["m2d/r70_h0/n"])
    for clip in (0, 5):
        weights, p = golden["m2d/weight_mad"][clip], golden["m2d/r70_h0/visible_rate"][clip]
        ids = [draws * clip + i for i in range(draws)]
        visible, _ = call(
            [n] * draws, [k] * draws, torch.from_numpy(weights).repeat(draws), ids=ids, implementation=name
        )
        found = torch.bincount(visible.long() % n, minlength=n).double().numpy() / draws
        error = np.sqrt(p * (1 - p) * (1 / draws + 1 / theirs)) + 1e-3
        assert np.abs((found - p) / error).max() < 4.5


@pytest.mark.parametrize("name", NAMES)
def test_without_sampling_the_largest_scores_are_masked(name: str) -> None:
    sizes, counts = [64, 1, 0, 33], [20, 0, 0, 30]
    scores = odd_scores(sum(sizes), 11, 0.2)
    _, masked = call(sizes, counts, scores, sample=False, implementation=name)
    found, start = masked.tolist(), 0
    for n, k in zip(sizes, counts, strict=True):
        own = scores[start : start + n].nan_to_num(0.0, posinf=torch.inf).clamp(min=0)
        order = own.sort(descending=True, stable=True).indices[: n - k]
        assert found[: n - k] == sorted((start + order).tolist())
        found, start = found[n - k :], start + n
    equal = call([12] * 2, [5] * 2, torch.full((24,), 0.5), sample=False, implementation=name)
    assert equal[1].tolist() == [*range(7), *range(12, 19)]


@pytest.mark.parametrize("name", NAMES)
def test_strided_scores_and_a_mask_of_its_own_for_each_stream(name: str) -> None:
    wide = odd_scores(200, 5, 0.0)
    plain = [call([50, 50], [20, 20], wide[::2], stream=s, implementation=name) for s in (0, 1)]
    for stream, found in enumerate(plain):
        want = call([50, 50], [20, 20], wide[::2].contiguous(), stream=stream)
        assert all(map(torch.equal, found, want))
    assert not torch.equal(plain[0][1], plain[1][1])


@pytest.mark.parametrize("name", ["reference", NAMES[1]])
def test_a_traced_step_draws_anew_without_recompiling(name: str) -> None:
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    def step(cu: Tensor, counter: Tensor, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return select_tokens(cu, (30, 20), (9, 9), counter, ids, scores=scores, implementation=name)

    # A traced step that waited for a value would break its graph.
    traced = torch.compile(step, backend=backend, fullgraph=True)
    cu, ids, seen = torch.tensor([0, 30, 50], dtype=torch.int32), torch.tensor([8, 9]), set()
    for number in range(3):
        counter, scores = torch.tensor([SEED, number]), odd_scores(50, number, 0.1)
        got, want = traced(cu, counter, ids, scores), step(cu, counter, ids, scores)
        assert all(map(torch.equal, got, want))
        seen.add(tuple(got[0].tolist()))
    assert len(seen) == 3 and len(compiles) == 1


def test_opcheck() -> None:
    scores, cu = torch.rand(5), torch.tensor([0, 2, 5], dtype=torch.int32)
    counts, draw = ((2, 3), (1, 2)), (torch.tensor([SEED, STEP]), torch.arange(2))
    for sample in (True, False):
        options = (None, scores, sample, False, 0)
        if _native.cpu() is not None:
            torch.library.opcheck(torch.ops.masktrain.select_tokens.default, (*counts, *draw, *options))
        if TRITON is None:
            moved = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in (cu, *counts, *draw, *options)]
            torch.library.opcheck(torch.ops.masktrain.select_tokens_triton.default, tuple(moved))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scores": torch.zeros(9)}, ValueError, r"scores must have shape \(10,\), received \(9,\)"),
        ({"scores": torch.zeros(10, 1)}, ValueError, r"scores must have shape \(10,\)"),
        ({"scores": torch.zeros(10).double()}, TypeError, "scores must be float32, received float64"),
        ({"scores": torch.zeros(10).half()}, TypeError, "scores must be float32, received float16"),
        ({"scores": [1.0] * 10}, TypeError, "scores must be a tensor, received list"),
        ({"scores": torch.zeros(10, device="meta")}, ValueError, "scores must be on cpu"),
        ({"scores": torch.zeros(10, requires_grad=True)}, ValueError, "scores is data and must not require"),
        (
            {"scores": None, "sample": False},
            ValueError,
            "sample=False takes the largest scores and needs scores",
        ),
        ({"stream": -1}, ValueError, r"stream must lie in \[0, 4294967296\), received -1"),
    ],
)
def test_refuses(change: dict, error: type[Exception], words: str) -> None:
    good = {
        "cu_tokens": torch.tensor([0, 4, 10], dtype=torch.int32),
        "n_tokens": (4, 6),
        "n_visible": (1, 2),
        "counter": torch.zeros(2, dtype=torch.int64),
        "clip_ids": torch.zeros(2, dtype=torch.int64),
        "scores": torch.ones(10),
    }
    with pytest.raises(error, match=words):
        select_tokens(**good | change)
