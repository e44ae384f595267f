# SPDX-License-Identifier: Apache-2.0
"""Inverse block masks: the number of blocks, how much they cover, the fill rule, the start epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from masks import batch, key, shown
from scipy import stats

from masktrain.errors import ConfigError
from masktrain.kernels.block_marks import block_marks
from masktrain.masking import InverseBlockMasking, RandomMasking, check_plan, visible_count

DRAWS = 4000


@pytest.mark.parametrize(
    ("n", "ratio", "side", "adjust", "blocks"),
    [
        # The published grids: EAT, EAT large, M2D at both ratios, data2vec 2.0 on images.
        (512, 0.8, 5, 0.07, 5),
        (512, 0.75, 5, 0.1, 7),
        (190, 0.7, 5, 0.07, 2),
        (190, 0.75, 5, 0.07, 2),
        (196, 0.8, 3, 0.07, 5),
        (40, 0.8, 5, 0.07, 0),
        (0, 0.8, 5, 0.07, 0),
    ],
)
def test_number_of_blocks(n: int, ratio: float, side: int, adjust: float, blocks: int) -> None:
    assert InverseBlockMasking(mask_ratio=ratio, side=side, adjust=adjust).blocks(n) == blocks


@pytest.mark.parametrize(
    ("columns", "freq", "ratio", "mean", "within"), [(38, 5, 0.7, 35.0, 0.4), (64, 8, 0.8, 95.8, 0.7)]
)
def test_blocks_are_visible_before_anything_else(
    columns: int, freq: int, ratio: float, mean: float, within: float
) -> None:
    """The blocks of the mask cover what the published ones do; they are kept before scattered tokens."""
    masking = InverseBlockMasking(mask_ratio=ratio)
    layout, _ = batch([columns] * DRAWS, freq, frames=torch.empty(0, freq))
    n = columns * freq
    marks = block_marks(
        layout.cu_tokens,
        layout.lengths,
        None,
        key().counter,
        layout.clip_ids,
        freq=freq,
        order="time",
        sides=(masking.side,),
        growth="clamped",
        blocks=(masking.blocks(n),) * DRAWS,
    )
    marked = marks.view(DRAWS, n).bool()
    assert abs(float(marked.sum(1).double().mean()) - mean) < within
    v = shown(masking.plan(layout, key())).view(DRAWS, n)
    target = visible_count(n, ratio)
    few = marked.sum(1) <= target
    assert (few.any() and (~few).any()) or columns == 38
    assert not (marked & ~v)[few].any() and not (v & ~marked)[~few].any()
    # What fills a mask up lies anywhere outside of its blocks: compare the filled cells' chance per clip.
    filled, free = (v & ~marked)[few].double(), (~marked)[few].double()
    chance = (target - marked[few].sum(1, keepdim=True)) / free.sum(1, keepdim=True)
    expected, spread = (free * chance).sum(0), (free * chance * (1 - chance)).sum(0)
    z = (filled.sum(0) - expected) / spread.sqrt()
    assert float((z**2).sum()) < stats.chi2.isf(1e-4, n) and float((z**2).mean()) > 0.6


def test_no_block_is_a_random_mask_of_the_count() -> None:
    layout, _ = batch([5, 1, 0, 7], 2)
    plan = InverseBlockMasking().plan(layout, key())
    check_plan(plan)
    # int(10 (1 - 0.8)) is 1 in double precision.
    assert plan.n_visible == (1, 1, 0, 2)
    assert torch.equal(plan.visible, RandomMasking(mask_ratio=0.8).plan(layout, key()).visible)


def test_random_until_the_start_epoch() -> None:
    layout, view = batch([38] * 3, 5)
    masking = InverseBlockMasking(start_epoch=50)
    assert (masking.needs, InverseBlockMasking().needs) == ("progress", "nothing")
    random = RandomMasking(mask_ratio=0.8).plan(layout, key(), 1)
    blocks = InverseBlockMasking().plan(layout, key(), 1)
    for progress, expected in ((0, random), (49.99 / 300, random), (50 / 300, blocks), (1, blocks)):
        assert torch.equal(
            masking.plan(layout, key(), 1, replace(view, progress=progress)).visible, expected.visible
        )
    assert not torch.equal(random.visible, blocks.visible)
    with pytest.raises(ValueError, match="needs a view"):
        masking.plan(layout, key())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"side": 0}, r"masking\.side: a whole number of tokens, at least 1; received 0"),
        ({"side": 2.0}, r"masking\.side"),
        ({"adjust": -0.1}, r"masking\.adjust: a share .* received -0\.1"),
        ({"adjust": float("nan")}, r"masking\.adjust"),
        ({"start_epoch": 400}, r"masking\.start_epoch: a whole number from 0 to .* 300; received 400"),
        ({"epochs": 0}, r"masking\.epochs"),
    ],
)
def test_options(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        InverseBlockMasking(**change)
