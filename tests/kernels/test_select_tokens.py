# SPDX-License-Identifier: Apache-2.0
"""select_tokens against a sort of plain Python keys, its uniformity, and its independence of the batch."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from masktrain.kernels import _native, _triton
from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.philox import Purpose, host_words
from masktrain.kernels.select_tokens import reference, select_tokens

SEED, STEP = 123456789012, 7


def call(n_tokens, n_visible, clip_ids, *, classes=None, shared=False, seed=SEED, step=STEP, **options):
    return select_tokens(
        torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32),
        tuple(n_tokens),
        tuple(n_visible),
        torch.tensor([seed, step]),
        torch.tensor(clip_ids, dtype=torch.int64),
        classes=None if classes is None else torch.tensor(classes, dtype=torch.uint8),
        shared=shared,
        **options,
    )


def expected(n_tokens, n_visible, clip_ids, classes=None, shared=False, words=host_words, stream=0):
    visible, masked, start = [], [], 0
    for n, k, clip_id in zip(n_tokens, n_visible, clip_ids, strict=True):
        drawn = words(SEED, STEP, 0 if shared else clip_id, n, purpose=Purpose.MASK, stream=stream)
        of_class = [0] * n if classes is None else classes[start : start + n]
        by_key = sorted(range(n), key=lambda t: (of_class[t], drawn[t], t))
        visible += [start + t for t in sorted(by_key[:k])]
        masked += [start + t for t in sorted(by_key[k:])]
        start += n
    return visible, masked


@st.composite
def batches(draw):
    n_tokens = draw(st.lists(st.integers(0, 30), min_size=0, max_size=6))
    n_visible = [draw(st.integers(0, n)) for n in n_tokens]
    clip_ids = [draw(st.integers(0, 2**33)) for _ in n_tokens]
    classes = draw(st.none() | st.lists(st.integers(0, 3), min_size=sum(n_tokens), max_size=sum(n_tokens)))
    return n_tokens, n_visible, clip_ids, classes


@given(batches())
@settings(max_examples=150, deadline=None)
def test_equals_the_sorted_keys(batch):
    n_tokens, n_visible, clip_ids, classes = batch
    with poisoned_memory():
        visible, masked = call(n_tokens, n_visible, clip_ids, classes=classes)
    assert visible.dtype == masked.dtype == torch.int32
    assert (visible.tolist(), masked.tolist()) == expected(n_tokens, n_visible, clip_ids, classes)
    again = call(n_tokens, n_visible, clip_ids, classes=classes)
    assert torch.equal(visible, again[0]) and torch.equal(masked, again[1])


def test_equal_words_go_to_the_lower_token(monkeypatch):
    def few(counter, ids, n, **kw):
        return words(counter, ids, n, **kw) % 3

    words = reference.philox_words
    monkeypatch.setattr(reference, "philox_words", few)
    n_tokens, n_visible, ids = [40, 25, 40], [11, 12, 30], [5, 6, 7]
    visible, masked = call(n_tokens, n_visible, ids, implementation="reference")
    want = expected(n_tokens, n_visible, ids, words=lambda *a, **kw: [w % 3 for w in host_words(*a, **kw)])
    assert (visible.tolist(), masked.tolist()) == want


def test_a_clip_does_not_depend_on_its_batch():
    n_tokens, n_visible, ids = [20, 7, 33], [5, 3, 9], [4, 900, 17]
    alone = [call([n], [k], [i])[0].tolist() for n, k, i in zip(n_tokens, n_visible, ids, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2]):
        lengths = [n_tokens[i] for i in order]
        visible, _ = call(lengths, [n_visible[i] for i in order], [ids[i] for i in order])
        starts = [0, *accumulate(lengths)]
        parts = visible.split([n_visible[i] for i in order])
        assert [(p - s).tolist() for p, s in zip(parts, starts, strict=False)] == [alone[i] for i in order]


def test_classes_come_first_and_the_cut_class_is_uniform():
    draws = 4000
    classes = [0] * 3 + [1] * 6 + [2] * 3
    visible, _ = call([12] * draws, [5] * draws, list(range(draws)), classes=classes * draws)
    counts = torch.bincount(visible.long() % 12, minlength=12)
    assert counts[:3].tolist() == [draws] * 3
    assert counts[9:].tolist() == [0] * 3
    # Two of six: every pair equally likely.
    rows = (visible.view(draws, 5) % 12)[:, 3:]
    pairs = torch.bincount((rows[:, 0] * 12 + rows[:, 1]).long(), minlength=144)
    assert (pairs > 0).sum() == 15
    assert stats.chisquare(pairs[pairs > 0].numpy()).pvalue > 1e-4


def test_uniform_over_tokens_clips_and_steps():
    draws, n, k = 3000, 40, 10
    by_clip, _ = call([n] * draws, [k] * draws, list(range(draws)))
    by_step = torch.cat([call([n] * 50, [k] * 50, list(range(50)), step=s)[0] for s in range(60)])
    for visible in (by_clip, by_step):
        counts = torch.bincount(visible.long() % n, minlength=n).double()
        # Counts of a draw without replacement correlate by -1 / (n - 1): chi2 shrinks by (n - 1) / n.
        p = k / n
        chi2 = ((counts - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (n - 1) / n
        assert 1e-4 < stats.chi2.sf(float(chi2), n - 1) < 1 - 1e-4


@pytest.mark.parametrize("implementation", ["reference", "native", "triton"])
def test_each_stream_draws_a_mask_of_its_own(implementation):
    if implementation == "native" and _native.cpu() is None:
        pytest.skip(f"{_native.why_not()}")
    if implementation == "triton" and _triton.why_not(torch.zeros(0)) is not None:
        pytest.skip(f"{_triton.why_not(torch.zeros(0))}")
    for stream in (0, 1, 2**32 - 1):
        visible, masked = call([30, 9], [11, 4], [5, 6], stream=stream, implementation=implementation)
        assert (visible.tolist(), masked.tolist()) == expected([30, 9], [11, 4], [5, 6], stream=stream)
    draws, n, k = 1000, 40, 10
    rows = [
        torch.zeros(draws, n).scatter_(1, (ids % n).long().view(draws, k), 1.0)
        for ids in (call([n] * draws, [k] * draws, list(range(draws)), stream=s)[0] for s in (0, 1))
    ]
    # Tokens that two independent masks share: hypergeometric, with this mean and variance.
    shared, mean = float((rows[0] * rows[1]).sum() / draws), k * k / n
    variance = mean * (n - k) / n * (n - k) / (n - 1)
    assert abs(shared - mean) < 4.5 * (variance / draws) ** 0.5


def test_shared_draws_one_mask():
    visible, masked = call([20] * 4, [6] * 4, [3, 1, 4, 1], shared=True)
    rows = visible.view(4, 6) - torch.arange(4)[:, None] * 20
    assert (rows == rows[0]).all()
    assert (visible.tolist(), masked.tolist()) == expected([20] * 4, [6] * 4, [3, 1, 4, 1], shared=True)


def test_empty_batch_and_one_token_clips():
    visible, masked = call([], [], [])
    assert visible.shape == masked.shape == (0,)
    visible, masked = call([1, 1, 1], [1, 1, 1], [0, 1, 2])
    assert visible.tolist() == [0, 1, 2]
    assert masked.shape == (0,)


def test_non_contiguous_inputs():
    ids, classes = torch.arange(8), torch.randint(0, 3, (40,), dtype=torch.int32)
    counter = torch.tensor([SEED, 0, STEP])
    cu = torch.arange(5, dtype=torch.int32) * 5
    got = select_tokens(cu, (5,) * 4, (2,) * 4, counter[::2], ids[::2], classes=classes[::2])
    want = select_tokens(
        cu,
        (5,) * 4,
        (2,) * 4,
        counter[::2].contiguous(),
        ids[::2].contiguous(),
        classes=classes[::2].contiguous(),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_traced_step_draws_anew_without_recompiling():
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    def step(cu, counter, ids):
        return select_tokens(cu, (30, 30), (9, 9), counter, ids)

    traced = torch.compile(step, backend=backend, fullgraph=True)
    cu, ids = torch.tensor([0, 30, 60], dtype=torch.int32), torch.tensor([8, 9])
    seen = []
    for s in range(3):
        counter = torch.tensor([SEED, s])
        got, want = traced(cu, counter, ids), step(cu, counter, ids)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        seen.append(tuple(got[0].tolist()))
    assert len(set(seen)) == 3
    assert len(compiles) == 1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_tokens": [4, 6]}, TypeError, "n_tokens must be a tuple of int"),
        ({"n_tokens": (4, -6)}, ValueError, "n_tokens must hold numbers >= 0, received -6"),
        ({"n_visible": (1,)}, ValueError, "n_visible must hold one number for each of 2 clips, received 1"),
        ({"n_visible": (1, 7)}, ValueError, "n_visible must be at most the 6 tokens of clip 1, received 7"),
        (
            {"cu_tokens": torch.zeros(3, dtype=torch.int64)},
            TypeError,
            "cu_tokens must be int32, received int64",
        ),
        ({"counter": torch.zeros(3, dtype=torch.int64)}, ValueError, r"counter must have shape \(2,\)"),
        ({"counter": torch.zeros(2)}, TypeError, "counter must be int64, received float32"),
        ({"clip_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"clip_ids must have shape \(2,\)"),
        ({"classes": torch.zeros(9, dtype=torch.uint8)}, ValueError, r"classes must have shape \(10,\)"),
        (
            {"classes": torch.zeros(10)},
            TypeError,
            "classes must be uint8 or int32 or int64, received float32",
        ),
        ({"shared": True}, ValueError, "shared=True needs equal n_tokens in all clips, received 4 to 6"),
        (
            {"clip_ids": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "clip_ids must be on cpu",
        ),
    ],
)
def test_refuses(change, error, words):
    good = {
        "cu_tokens": torch.tensor([0, 4, 10], dtype=torch.int32),
        "n_tokens": (4, 6),
        "n_visible": (1, 2),
        "counter": torch.zeros(2, dtype=torch.int64),
        "clip_ids": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(error, match=words):
        select_tokens(**good | change)
