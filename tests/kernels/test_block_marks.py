# SPDX-License-Identifier: Apache-2.0
"""block_marks against the loop that it stands for: blocks placed one by one until the count is exceeded, or so many."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import numpy as np
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
        None if n_marked is None else tuple(n_marked),
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


def clamped_loop(n, blocks, clip_id, *, freq, order, side, stream=0):
    """One clip: each centre marks its block, cell by cell, coordinates clamped into the grid."""
    columns = n // freq
    marks = [0] * n
    drawn = host_words(SEED, STEP, clip_id, blocks, purpose=Purpose.MASK_SHAPE, stream=2 * stream + 1)
    for word in drawn if n else ():
        column, row = divmod(word * n >> 32, freq)
        for i in range(side):
            for j in range(side):
                c = min(max(column - side // 2 + i, 0), columns - 1)
                r = min(max(row - side // 2 + j, 0), freq - 1)
                marks[c * freq + r if order == "time" else r * columns + c] = 1
    return marks


@st.composite
def clamped_batches(draw):
    freq = draw(st.integers(1, 6))
    n_tokens = [freq * draw(st.integers(0, 8)) for _ in range(draw(st.integers(0, 4)))]
    blocks = [draw(st.integers(0, 9)) for _ in n_tokens]
    clip_ids = [draw(st.integers(0, 1000)) for _ in n_tokens]
    options = {
        "freq": freq,
        "order": draw(st.sampled_from(["time", "freq"])),
        "stream": draw(st.integers(0, 3)),
    }
    return n_tokens, tuple(blocks), clip_ids, draw(st.integers(1, 9)), options


@given(clamped_batches())
@settings(max_examples=200, deadline=None)
def test_clamped_equals_the_loop(batch):
    n_tokens, blocks, clip_ids, side, options = batch
    marks = call(n_tokens, None, clip_ids, growth="clamped", blocks=blocks, sides=(side,), **options)
    assert marks.dtype == torch.uint8
    clips = zip(n_tokens, blocks, clip_ids, strict=True)
    assert marks.tolist() == [m for n, k, i in clips for m in clamped_loop(n, k, i, side=side, **options)]


def test_clamped_centres_are_uniform():
    """Blocks of one cell are their centres: each cell as often, and twice the same as often as with replacement."""
    draws, n = 20_000, 24
    marks = call(
        [n] * draws,
        None,
        range(draws),
        freq=4,
        order="freq",
        growth="clamped",
        blocks=(2,) * draws,
        sides=(1,),
    )
    marks = marks.view(draws, n).double()
    rate, twice = 1 - (1 - 1 / n) ** 2, 1 / n
    assert (marks.mean(0) - rate).abs().max() < 5 * (rate * (1 - rate) / draws) ** 0.5
    same = (marks.sum(1) == 1).double().mean()
    assert abs(same - twice) < 5 * (twice * (1 - twice) / draws) ** 0.5


@pytest.mark.parametrize(
    "case", ["eat_64x8_b5_r80", "eat_large_64x8_b5_r75", "m2d_5x38_b5_r70", "d2v2_14x14_b3_r80"]
)
def test_clamped_blocks_are_the_authors(case: str, golden_dir: Path):
    """Rate of each cell and the number of cells, against the masks that the authors' code drew."""
    draws = 20_000
    with np.load(golden_dir / "masking" / "A_block.npz") as file:
        theirs = torch.from_numpy(file[f"{case}/block_rate"])
        counts, frequency = torch.from_numpy(file[f"{case}/block_count_hist"]).double()
    rows, columns, side, blocks = {
        "eat_64x8_b5_r80": (64, 8, 5, 5),
        "eat_large_64x8_b5_r75": (64, 8, 5, 7),
        "m2d_5x38_b5_r70": (5, 38, 5, 2),
        "d2v2_14x14_b3_r80": (14, 14, 3, 5),
    }[case]
    # Row by row, as the golden grids are.
    n = rows * columns
    marks = call(
        [n] * draws, None, range(draws), freq=columns, order="time", growth="clamped", blocks=(blocks,) * draws,
        sides=(side,),
    ).view(draws, n).double()  # fmt: skip
    n_theirs = frequency.sum()
    pooled = (marks.sum(0) + theirs * n_theirs) / (draws + n_theirs)
    error = (pooled * (1 - pooled) * (1 / draws + 1 / n_theirs)).sqrt()
    z = (marks.mean(0) - theirs) / error
    assert z.abs().max() < 5
    mean = (counts * frequency).sum() / n_theirs
    spread = ((counts - mean) ** 2 * frequency).sum() / n_theirs
    ours = marks.sum(1)
    assert abs(ours.mean() - mean) < 4 * (spread * (1 / draws + 1 / n_theirs)).sqrt()
    assert abs(ours.var() / spread - 1) < 0.1


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


def test_both_orders_mark_the_same_clamped_blocks():
    options = {"freq": 8, "growth": "clamped", "blocks": (3, 5), "sides": (4,)}
    by_time = call([48, 96], None, [1, 2], order="time", **options)
    by_freq = call([48, 96], None, [1, 2], order="freq", **options)
    for a, b in zip(by_time.split([48, 96]), by_freq.split([48, 96]), strict=True):
        assert torch.equal(a.view(-1, 8), b.view(8, -1).T)


def test_shared_marks():
    marks = call([48] * 3, [20] * 3, [5, 6, 7], freq=8, order="time", shared=True).view(3, 48)
    assert (marks == marks[0]).all()
    assert torch.equal(marks[0], call([48], [20], [0], freq=8, order="time"))


def test_shared_clamped_blocks():
    options = {"freq": 8, "order": "time", "growth": "clamped", "sides": (3,)}
    marks = call([48] * 3, None, [5, 6, 7], shared=True, blocks=(2,) * 3, **options).view(3, 48)
    assert (marks == marks[0]).all()
    assert torch.equal(marks[0], call([48], None, [0], blocks=(2,), **options))


CLAMPED = {"growth": "clamped", "blocks": (1, 2), "sides": (3,), "n_marked": None}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"n_tokens": (8, 10)}, ValueError, "n_tokens must be multiples of freq = 4, received 10 for clip 1"),
        ({"n_marked": (9, 1)}, ValueError, "n_marked must be at most the 8 tokens of clip 0, received 9"),
        ({"freq": 0}, ValueError, "freq must be at least 1, received 0"),
        ({"order": "row"}, ValueError, "order must be one of 'time', 'freq', received 'row'"),
        (
            {"growth": "free"},
            ValueError,
            "growth must be one of 'clipped', 'wrap', 'clamped', received 'free'",
        ),
        ({"n_marked": None}, TypeError, "n_marked must be a tuple of int, received None"),
        ({"blocks": (1, 2)}, ValueError, r"blocks must be None; received \(1, 2\)"),
        (CLAMPED | {"blocks": None}, TypeError, "blocks must be a tuple of int, received None"),
        (
            CLAMPED | {"blocks": (1,)},
            ValueError,
            "blocks must hold one number for each of 2 clips, received 1",
        ),
        (CLAMPED | {"sides": (3, 4)}, ValueError, r'growth "clamped" takes one side, received \(3, 4\)'),
        (CLAMPED | {"n_marked": (1, 2)}, ValueError, r"n_marked must be None; received \(1, 2\)"),
        (CLAMPED | {"truncation": "first"}, ValueError, "truncation must be 'random'; received 'first'"),
        (CLAMPED | {"spare_first": True}, ValueError, "spare_first must be False; received True"),
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
