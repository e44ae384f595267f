# SPDX-License-Identifier: Apache-2.0
"""The strategies: partitions with exact counts, reproducible, independent of the batch, uniform."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from masktrain.config import from_dict, to_dict
from masktrain.errors import ConfigError
from masktrain.masking import (
    STRATEGIES,
    ChunkMasking,
    FrameMasking,
    RandomMasking,
    Strategy,
    check_plan,
    strategy,
    visible_count,
)
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, TokenLayout, cumulative

ALL = [
    RandomMasking(),
    ChunkMasking(),
    ChunkMasking(growth="wrap", truncation="first"),
    ChunkMasking(growth="wrap", truncation="first", spare_first=True),
    ChunkMasking(growth="wrap", truncation="random", sides=(2,)),
    FrameMasking(),
]


def layout(
    columns: list[int], freq: int = 4, order: str = "time", clip_ids: list[int] | None = None
) -> TokenLayout:
    grid = TokenGrid(freq=freq, patch_freq=1, patch_time=1, order=order)
    lengths = tuple(columns)
    ids = torch.tensor(list(range(len(columns))) if clip_ids is None else clip_ids, dtype=torch.int64)
    frames = torch.zeros(sum(columns), freq)
    return grid.layout(Spectrogram(frames, lengths, cumulative(lengths, torch.int64, "cpu"), ids))


def key(step: int = 0, seed: int = 42) -> StepKey:
    return StepKey.make(seed, step, "cpu")


def local_visible(plan: MaskPlan) -> list[list[int]]:
    """The visible tokens of each clip, counted from its first."""
    starts = plan.layout.cu_tokens[:-1].tolist()
    parts = plan.visible.split(list(plan.n_visible))
    return [(p - s).tolist() for p, s in zip(parts, starts, strict=True)]


@st.composite
def any_strategy(draw):
    mask_ratio = draw(st.floats(0.01, 0.99))
    return draw(
        st.sampled_from(
            [
                RandomMasking(mask_ratio=mask_ratio),
                FrameMasking(mask_ratio=mask_ratio),
                *[
                    ChunkMasking(mask_ratio=mask_ratio, growth=g, truncation=t, spare_first=s)
                    for g in ("clipped", "wrap")
                    for t in ("random", "first")
                    for s in (False, True)
                ],
            ]
        )
    )


@given(
    any_strategy(),
    st.lists(st.integers(0, 12), max_size=5),
    st.integers(1, 5),
    st.sampled_from(["time", "freq"]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_plan_is_a_partition_with_exact_counts(strategy, columns, freq, order, step):
    plan = strategy.plan(layout(columns, freq, order), key(step))
    check_plan(plan)
    if isinstance(strategy, FrameMasking):
        assert plan.n_visible == tuple(freq * visible_count(c, strategy.mask_ratio) for c in columns)
    else:
        assert plan.n_visible == tuple(visible_count(freq * c, strategy.mask_ratio) for c in columns)
    again = strategy.plan(layout(columns, freq, order), key(step))
    assert torch.equal(plan.visible, again.visible) and torch.equal(plan.masked, again.masked)


@given(any_strategy(), st.data(), st.sampled_from(["time", "freq"]))
@settings(max_examples=60, deadline=None)
def test_a_clip_does_not_depend_on_its_batch(strategy, data, order):
    columns = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    ids = data.draw(
        st.lists(st.integers(0, 2**31), min_size=len(columns), max_size=len(columns), unique=True)
    )
    shuffled = data.draw(st.permutations(range(len(columns))))
    whole = local_visible(strategy.plan(layout(columns, 4, order, ids), key(3)))
    moved = layout([columns[i] for i in shuffled], 4, order, [ids[i] for i in shuffled])
    assert local_visible(strategy.plan(moved, key(3))) == [whole[i] for i in shuffled]
    for i, c in enumerate(columns):
        assert local_visible(strategy.plan(layout([c], 4, order, [ids[i]]), key(3))) == [whole[i]]


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_seed_step_and_clip_each_change_the_mask(strategy):
    tokens = layout([40, 40])
    base = local_visible(strategy.plan(tokens, key(1, seed=1)))
    assert base[0] != base[1]
    assert local_visible(strategy.plan(tokens, key(2, seed=1))) != base
    assert local_visible(strategy.plan(tokens, key(1, seed=2))) != base
    assert local_visible(strategy.plan(tokens, key(1, seed=1 + 2**40))) != base


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_a_traced_step_draws_anew_without_recompiling(strategy):
    compiles = []

    def backend(graph, example_inputs):
        compiles.append(graph)
        return graph.forward

    def step(tokens, counter):
        plan = strategy.plan(tokens, StepKey(counter, 0, 0))
        return plan.visible, plan.masked

    traced = torch.compile(step, backend=backend, fullgraph=True)
    tokens, seen = layout([40, 40, 20]), set()
    for s in range(3):
        counter = torch.tensor([5, s])
        got, want = traced(tokens, counter), step(tokens, counter)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        seen.add(tuple(got[0].tolist()))
    assert len(seen) == 3
    assert len(compiles) == 1


@pytest.mark.parametrize("strategy", ALL, ids=str)
def test_one_token_clips_and_the_empty_batch(strategy):
    one = strategy.plan(layout([1, 1, 1], freq=1), key())
    check_plan(one)
    assert (one.n_visible, one.n_masked) == ((1, 1, 1), (0, 0, 0))
    assert one.masked.shape == (0,)
    empty = strategy.plan(layout([]), key())
    check_plan(empty)
    assert empty.visible.shape == empty.masked.shape == (0,)


@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("shared", [False, True])
def test_random_is_uniform_over_tokens(order, shared):
    """Every token is visible at the same rate."""
    draws, freq, columns = 4000, 4, 10
    n = freq * columns
    if shared:
        plans = [
            RandomMasking(mask_ratio=0.75, shared_in_batch=True).plan(
                layout([columns] * 2, freq, order), key(s)
            )
            for s in range(400)
        ]
        rows = torch.stack([p.visible.view(2, 10) - torch.tensor([[0], [n]]) for p in plans])
        assert torch.equal(rows[:, 0], rows[:, 1])
        visible, draws = rows[:, 0].flatten(), 400
    else:
        plan = RandomMasking(mask_ratio=0.75).plan(layout([columns] * draws, freq, order), key())
        visible = plan.visible % n
    counts = torch.bincount(visible.long(), minlength=n).double()
    p = 10 / n
    chi2 = ((counts - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (n - 1) / n
    assert 1e-4 < stats.chi2.sf(float(chi2), n - 1) < 1 - 1e-4


@pytest.mark.parametrize("order", ["time", "freq"])
def test_frames_are_masked_whole_and_uniformly(order):
    draws, freq, columns = 2000, 4, 12
    plan = FrameMasking(mask_ratio=0.75).plan(layout([columns] * draws, freq, order), key())
    shown = torch.zeros(draws * freq * columns, dtype=torch.bool)
    shown[plan.visible.long()] = True
    grid = shown.view(draws, columns, freq) if order == "time" else shown.view(draws, freq, columns).mT
    assert torch.equal(grid.any(2), grid.all(2))
    assert (grid.all(2).sum(1) == 3).all()
    counts = grid.all(2).sum(0).double()
    chi2 = ((counts - draws / 4) ** 2).sum() / (draws * 3 / 16) * (columns - 1) / columns
    assert 1e-4 < stats.chi2.sf(float(chi2), columns - 1) < 1 - 1e-4


@pytest.mark.parametrize("order", ["time", "freq"])
def test_frames_of_one_token_are_random_tokens(order):
    tokens = layout([50, 7, 1], freq=1, order=order)
    frame, random = FrameMasking(mask_ratio=0.6), RandomMasking(mask_ratio=0.6)
    assert torch.equal(frame.plan(tokens, key(9)).visible, random.plan(tokens, key(9)).visible)


@pytest.mark.parametrize("strategy", [RandomMasking, ChunkMasking])
def test_one_mask_for_the_batch(strategy):
    shared = strategy(shared_in_batch=True)
    first, *others = local_visible(shared.plan(layout([20] * 4, clip_ids=[9, 3, 9, 7]), key(1)))
    assert all(o == first for o in others)
    assert local_visible(shared.plan(layout([20], clip_ids=[1000]), key(1))) == [first]
    with pytest.raises(ConfigError, match=r"masking.shared_in_batch.*received clips of 16 to 80 tokens"):
        shared.plan(layout([20, 4]), key(1))


@pytest.mark.parametrize("name", ["random", "chunk", "frame"])
def test_registry_and_json(name):
    cls = strategy(name)
    assert cls is STRATEGIES[name]
    assert (cls.name, cls.needs) == (name, "nothing")
    config = cls(mask_ratio=0.6)
    assert from_dict(Strategy, to_dict(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.mask_ratio = 0.5


def test_unknown_name():
    with pytest.raises(
        ConfigError,
        match=r"'chunks' is not known; allowed: random, frame, chunk, time, .*\. Did you mean 'chunk'\?",
    ):
        strategy("chunks")


@pytest.mark.parametrize("strategy", [RandomMasking, ChunkMasking, FrameMasking])
@pytest.mark.parametrize("mask_ratio", [0, 1, -0.1, 1.5, float("nan"), True, "0.5", None])
def test_mask_ratio_must_lie_between_0_and_1(strategy, mask_ratio):
    with pytest.raises(ConfigError, match=r"^masking\.mask_ratio: .* between 0 and 1"):
        strategy(mask_ratio=mask_ratio)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sides": ()}, r"masking\.sides: expected"),
        ({"sides": 3}, r"masking\.sides: expected at least one side such as \(3, 4, 5\), received 3"),
        ({"sides": (3, 0)}, r"masking\.sides: sides are whole numbers of at least 1, received \(3, 0\)"),
        ({"sides": (2.5,)}, r"masking\.sides: sides are whole numbers"),
        ({"growth": "free"}, r"masking\.growth: 'free' is not known; allowed: clipped, wrap"),
        ({"truncation": "last"}, r"masking\.truncation: 'last' is not known; allowed: random, first"),
    ],
)
def test_chunk_options(change, words):
    with pytest.raises(ConfigError, match=words):
        ChunkMasking(**change)
