# SPDX-License-Identifier: Apache-2.0
"""The token grid and the layout of a batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masktrain.types import Spectrogram, StepKey, TokenGrid, cumulative


def grid(**change) -> TokenGrid:
    return TokenGrid(**{"freq": 8, "patch_freq": 16, "patch_time": 16, "order": "time"} | change)


@pytest.mark.parametrize(
    ("frames", "partial", "columns"),
    [
        (998, "drop", 62),
        (998, "half", 62),
        (1000, "drop", 62),
        (1000, "half", 63),
        (1024, "half", 64),
        (7, "half", 0),
        (8, "half", 1),
        (15, "drop", 0),
        (0, "half", 0),
    ],
)
def test_a_column_exists_from_half_its_frames_on(frames, partial, columns):
    assert grid(partial=partial).columns(frames) == columns
    assert grid(partial=partial).tokens(frames) == 8 * columns


def test_frame_tokens():
    frames = grid(freq=1, patch_freq=128, patch_time=2, partial="drop")
    assert frames.tokens(998) == 499
    assert frames.tokens(999) == 499
    assert frames.patch_values == 256


@given(st.integers(0, 500), st.integers(1, 32))
def test_columns_count_the_frames_that_are_inside(frames, patch_time):
    inside = [min(patch_time, frames - c * patch_time) for c in range(frames // patch_time + 1)]
    half = sum(2 * n >= patch_time and n > 0 for n in inside)
    full = sum(n == patch_time for n in inside)
    assert grid(patch_time=patch_time, partial="half").columns(frames) == half
    assert grid(patch_time=patch_time, partial="drop").columns(frames) == full


def test_layout_of_a_batch():
    lengths = (33, 8, 7, 16)
    spectrogram = Spectrogram(
        torch.arange(64.0)[:, None].expand(64, 128),
        lengths,
        cumulative(lengths, torch.int64, "cpu"),
        torch.tensor([5, 6, 7, 8]),
    )
    layout = grid().layout(spectrogram)
    assert layout.columns == (2, 1, 0, 1)
    assert layout.lengths == (16, 8, 0, 8)
    assert layout.cu_tokens.tolist() == [0, 16, 24, 24, 32]
    assert layout.cu_tokens.dtype == torch.int32
    assert layout.cu_frames.tolist() == [0, 33, 41, 48, 64]
    assert layout.clip_ids.tolist() == [5, 6, 7, 8]
    assert spectrogram.clip(2)[:, 0].tolist() == list(range(41, 48))


def test_layout_of_an_empty_batch():
    empty = Spectrogram(
        torch.zeros(0, 128), (), cumulative((), torch.int64, "cpu"), torch.zeros(0, dtype=torch.int64)
    )
    assert grid().layout(empty).cu_tokens.tolist() == [0]


def test_step_key():
    key = StepKey.make(2**47 + 3, 11, "cpu")
    assert key.counter.tolist() == [2**47 + 3, 11]
    assert key.counter.dtype == torch.int64
    assert (key.seed, key.step) == (2**47 + 3, 11)
