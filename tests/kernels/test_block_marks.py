# SPDX-License-Identifier: Apache-2.0
"""block_marks against the loop that it stands for: blocks placed one by one until the count is exceeded."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.kernels import _native, _triton
from masktrain.kernels.block_marks import block_marks, reference
from masktrain.kernels.philox import Purpose, host_words

SEED, STEP = 99, 5


def call(n_tokens, n_marked, clip_ids, *, freq, order, **options):
    return block_marks(
        torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32),
        tuple(n_tokens),
        tuple(n_marked),
        torch.tensor([SEED, STEP]),
        torch.tensor(clip_ids, dtype=torch.int64),
        freq=freq,
        order=order,
        **options,
    )


def loop(
    n, n_marked, clip_id, *, freq, order, sides, growth, truncation, spare_first, stream=0, words=host_words
):
    """One clip: each start adds its block, in the order of the words; stop above n_marked."""
    columns, largest = n // freq, max(sides)
    pick = host_words(SEED, STEP, clip_id, 1, purpose=Purpose.MASK_SHAPE, stream=2 * stream)[0]
    side = sides[pick * len(sides) >> 32]
    if growth == "wrap":
        stride = freq if order == "time" else columns
        starts = list(range(n))
        blocks = [[s + stride * i + j for i in range(side) for j in range(side)] for s in starts]
        blocks = [[t for t in block if t < n] for block in blocks]
    else:
        starts = [(c, r) for c in range(1 - largest, columns) for r in range(1 - largest, freq)]
        cells = [
            [
                (c + i, r + j)
                for i in range(side)
                for j in range(side)
                if 0 <= c + i < columns and 0 <= r + j < freq
            ]
            for c, r in starts
        ]
        blocks = [[c * freq + r if order == "time" else r * columns + c for c, r in block] for block in cells]
    drawn = words(SEED, STEP, clip_id, len(starts), purpose=Purpose.MASK_SHAPE, stream=2 * stream + 1)
    marked: set[int] = set()
    for s in sorted(range(len(starts)), key=lambda s: (drawn[s], s)):
        marked |= {t for t in blocks[s] if t > 0 or not spare_first}
        if len(marked) > n_marked:
            break
    kept = sorted(marked)[:n_marked] if truncation == "first" else sorted(marked)
    return [int(t in kept) for t in range(n)]


@st.composite
def batches(draw):
    freq = draw(st.integers(1, 6))
    n_tokens = [freq * draw(st.integers(0, 8)) for _ in range(draw(st.integers(0, 4)))]
    n_marked = [draw(st.integers(0, n)) for n in n_tokens]
    clip_ids = [draw(st.integers(0, 1000)) for _ in n_tokens]
    options = {
        "freq": freq,
        "order": draw(st.sampled_from(["time", "freq"])),
        "sides": tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))),
        "growth": draw(st.sampled_from(["clipped", "wrap"])),
        "truncation": draw(st.sampled_from(["random", "first"])),
        "spare_first": draw(st.booleans()),
    }
    return n_tokens, n_marked, clip_ids, options


@given(batches())
@settings(max_examples=200, deadline=None)
def test_equals_the_loop(batch):
    n_tokens, n_marked, clip_ids, options = batch
    marks = call(n_tokens, n_marked, clip_ids, **options)
    assert marks.dtype == torch.uint8
    clips = zip(n_tokens, n_marked, clip_ids, strict=True)
    assert marks.tolist() == [m for n, k, i in clips for m in loop(n, k, i, **options)]
    assert torch.equal(marks, call(n_tokens, n_marked, clip_ids, **options))


@pytest.mark.parametrize("implementation", ["reference", "native", "triton"])
def test_each_stream_has_marks_of_its_own(implementation):
    if implementation == "native" and _native.cpu() is None:
        pytest.skip(f"{_native.why_not()}")
    if implementation == "triton" and _triton.why_not(torch.zeros(0)) is not None:
        pytest.skip(f"{_triton.why_not(torch.zeros(0))}")
    options = {"freq": 4, "order": "freq", "sides": (2, 3), "growth": "clipped", "truncation": "random"}
    seen = set()
    for stream in (0, 1, 2, 2**31 - 1):
        marks = call([40, 24], [12, 9], [3, 4], stream=stream, implementation=implementation, **options)
        loops = {"spare_first": False, "stream": stream, **options}
        assert marks.tolist() == loop(40, 12, 3, **loops) + loop(24, 9, 4, **loops)
        seen.add(tuple(marks.tolist()))
    assert len(seen) == 4


@pytest.mark.parametrize("growth", ["clipped", "wrap"])
def test_equal_words_go_to_the_lower_start(growth, monkeypatch):
    drawn = reference.philox_words

    def few(counter, ids, n, *, purpose, stream):
        words = drawn(counter, ids, n, purpose=purpose, stream=stream)
        return words if stream == 0 else words % 3

    monkeypatch.setattr(reference, "philox_words", few)
    options = {"freq": 4, "order": "time", "sides": (2, 3), "growth": growth, "truncation": "random"}
    marks = call([24, 40], [12, 30], [1, 2], **options, implementation="reference")
    options |= {"spare_first": False, "words": lambda *a, **kw: [w % 3 for w in host_words(*a, **kw)]}
    assert marks.tolist() == loop(24, 12, 1, **options) + loop(40, 30, 2, **options)


@pytest.mark.parametrize("growth", ["clipped", "wrap"])
def test_more_than_the_count_by_less_than_one_block(growth):
    draws, n_marked = 300, 200
    marks = call([320] * draws, [n_marked] * draws, list(range(draws)), freq=8, order="time", growth=growth)
    counts = marks.view(draws, 320).long().sum(1)
    assert (counts > n_marked).all()
    assert (counts <= n_marked + 25).all()


def test_both_orders_mark_the_same_clipped_blocks():
    by_time = call([48, 96], [20, 50], [1, 2], freq=8, order="time")
    by_freq = call([48, 96], [20, 50], [1, 2], freq=8, order="freq")
    for a, b in zip(by_time.split([48, 96]), by_freq.split([48, 96]), strict=True):
        assert torch.equal(a.view(-1, 8), b.view(8, -1).T)


def test_clipped_blocks_reach_every_cell_equally():
    """Each start is equally likely to be the first; every cell lies in the blocks of side^2 starts."""
    draws = 6000
    marks = call([60] * draws, [0] * draws, list(range(draws)), freq=6, order="time", sides=(3,))
    rate = marks.view(draws, 60).double().mean(0)
    # All cells have one rate, within 5 sigma.
    p = rate.mean()
    assert (rate - p).abs().max() < 5 * (p * (1 - p) / draws).sqrt()


def test_shared_marks():
    marks = call([48] * 3, [20] * 3, [5, 6, 7], freq=8, order="time", shared=True).view(3, 48)
    assert (marks == marks[0]).all()
    assert torch.equal(marks[0], call([48], [20], [0], freq=8, order="time"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_tokens": (8, 10)}, ValueError, "n_tokens must be multiples of freq = 4, received 10 for clip 1"),
        ({"n_marked": (9, 1)}, ValueError, "n_marked must be at most the 8 tokens of clip 0, received 9"),
        ({"freq": 0}, ValueError, "freq must be at least 1, received 0"),
        ({"order": "row"}, ValueError, "order must be one of 'time', 'freq', received 'row'"),
        ({"growth": "free"}, ValueError, "growth must be one of 'clipped', 'wrap', received 'free'"),
        ({"truncation": "last"}, ValueError, "truncation must be one of 'random', 'first', received 'last'"),
        ({"sides": ()}, TypeError, "sides must be a tuple of at least one int"),
        ({"sides": (3, 0)}, ValueError, "each of sides must be at least 1, received 0"),
        ({"stream": 2**31}, ValueError, r"stream must lie in \[0, 2147483648\), received 2147483648"),
        ({"shared": True}, ValueError, "shared=True needs equal n_tokens in all clips, received 8 to 12"),
        ({"counter": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "counter must be on cpu"),
    ],
)
def test_refuses(change, error, words):
    good = {
        "cu_tokens": torch.tensor([0, 8, 20], dtype=torch.int32),
        "n_tokens": (8, 12),
        "n_marked": (1, 2),
        "counter": torch.zeros(2, dtype=torch.int64),
        "clip_ids": torch.zeros(2, dtype=torch.int64),
        "freq": 4,
        "order": "time",
    }
    with pytest.raises(error, match=words):
        block_marks(**good | change)
