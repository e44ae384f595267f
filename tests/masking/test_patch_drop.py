# SPDX-License-Identifier: Apache-2.0
"""Patch-drop: the published count, one choice for the batch or one per clip."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from masks import batch, key, local_visible

from masktrain.errors import ConfigError
from masktrain.masking import PatchDropMasking, RandomMasking, check_plan


@given(st.integers(2, 700))
def test_four_fifths_stay(n: int) -> None:
    plan = PatchDropMasking().plan(batch([n], 1)[0], key())
    check_plan(plan)
    # floor(0.8 n) in the code's double precision; a clip of one token keeps it.
    assert plan.n_visible == (int(n * 0.8),)


def test_the_published_count() -> None:
    assert PatchDropMasking().plan(batch([50, 50], 12)[0], key()).n_visible == (480, 480)


def test_one_choice_for_the_batch_or_one_per_clip() -> None:
    layout, _ = batch([10] * 6, 5)
    first, *others = local_visible(PatchDropMasking().plan(layout, key()))
    assert all(o == first for o in others)
    each = PatchDropMasking(shared_in_batch=False)
    assert len({tuple(v) for v in local_visible(each.plan(layout, key()))}) == 6
    ragged, _ = batch([10, 3, 7], 5)
    random = RandomMasking(mask_ratio=0.2).plan(ragged, key(1), 2)
    assert torch.equal(each.plan(ragged, key(1), 2).visible, random.visible)
    with pytest.raises(ConfigError, match=r"masking\.shared_in_batch.*Set masking\.shared_in_batch=false"):
        PatchDropMasking().plan(ragged, key())


@pytest.mark.parametrize("share", [0, 1, -0.2, float("nan"), True, "0.2", None])
def test_the_share_must_lie_between_0_and_1(share: object) -> None:
    with pytest.raises(ConfigError, match=r"^masking\.drop_ratio: .* between 0 and 1"):
        PatchDropMasking(drop_ratio=share)
