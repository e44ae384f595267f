# SPDX-License-Identifier: Apache-2.0
"""Visible counts as the reference codes cut them, plans from explicit ids, and the checks of a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from masktrain.masking import check_plan, plan_from_ids, visible_count
from masktrain.types import Spectrogram, TokenGrid, TokenLayout, cumulative


def layout(lengths: tuple[int, ...], freq: int = 2, order: str = "time") -> TokenLayout:
    """Clips of the given numbers of columns."""
    grid = TokenGrid(freq=freq, patch_freq=1, patch_time=1, order=order)
    frames = torch.zeros(sum(lengths), freq)
    cu_frames = cumulative(lengths, torch.int64, "cpu")
    return grid.layout(Spectrogram(frames, lengths, cu_frames, torch.arange(len(lengths))))


@pytest.mark.parametrize(
    ("n", "mask_ratio", "visible"),
    [
        (190, 0.8, 37),
        (190, 0.9, 18),
        (190, 0.7, 57),
        (190, 0.75, 47),
        (496, 0.75, 124),
        (499, 0.75, 124),
        (512, 400 / 512, 112),
        (512, 250 / 512, 262),
        (512, 0.8, 102),
        (512, 0.6, 204),
        (2, 0.75, 1),
        (1, 0.75, 1),
        (1, 0.01, 1),
        (0, 0.75, 0),
    ],
)
def test_visible_count(n, mask_ratio, visible):
    assert visible_count(n, mask_ratio) == visible


def test_plan_from_ids():
    plan = plan_from_ids(layout((3, 1, 2)), [[4, 0], [1], []])
    assert plan.visible.tolist() == [0, 4, 7]
    assert plan.masked.tolist() == [1, 2, 3, 5, 6, 8, 9, 10, 11]
    assert (plan.n_visible, plan.n_masked) == ((2, 1, 0), (4, 1, 4))
    assert plan.cu_visible.tolist() == [0, 2, 3, 3]
    assert plan.cu_masked.tolist() == [0, 4, 5, 9]
    check_plan(plan)


def test_plan_from_the_ids_of_a_reference_project(golden_dir):
    z = np.load(golden_dir / "mae_ast" / "A_random.npz")
    clips, tokens = z["patches"].shape[:2]
    plan = plan_from_ids(layout((tokens,) * clips, freq=1), z["retained_ids"].tolist())
    check_plan(plan)
    offset = np.arange(clips)[:, None] * tokens
    assert plan.visible.tolist() == (np.sort(z["retained_ids"]) + offset).ravel().tolist()
    assert plan.masked.tolist() == (np.sort(z["masked_ids"]) + offset).ravel().tolist()


@pytest.mark.parametrize(
    ("visible", "words"),
    [
        ([[0], [0]], "expected ids for 3 clips, received 2"),
        ([[6], [0], [0]], r"clip 0 needs distinct tokens from 0 to 5, received \[6\]"),
        ([[0], [1, 1], [0]], r"clip 1 needs distinct tokens from 0 to 1, received \[1, 1\]"),
    ],
)
def test_plan_from_ids_refuses(visible, words):
    with pytest.raises(ValueError, match=words):
        plan_from_ids(layout((3, 1, 2)), visible)


def test_check_plan_finds_each_fault():
    plan = plan_from_ids(layout((3, 1)), [[0, 2], [1]])

    def ids(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    check_plan(plan)
    for fault, words in (
        ({"visible": plan.visible.long()}, "must be int32"),
        ({"cu_visible": ids(0, 2, 4)}, "cu_visible is"),
        ({"visible": ids(0, 2)}, "has 2 ids"),
        ({"visible": ids(2, 0, 7)}, "does not ascend"),
        ({"visible": ids(0, 6, 7)}, "other numbers of tokens"),
        ({"visible": ids(0, 1, 7)}, "not a partition"),
    ):
        with pytest.raises(ValueError, match=words):
            check_plan(replace(plan, **fault))
