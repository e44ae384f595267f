# SPDX-License-Identifier: Apache-2.0
"""Crops and padding of packed spectrograms."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.frontend.length import crop_to, crop_to_shortest, fill_with_silence, pad_to
from masktrain.kernels.philox import Purpose, host_words
from masktrain.types import AudioBatch, Spectrogram, StepKey, cumulative

LENGTHS = st.lists(st.integers(0, 40), max_size=6)


def packed(lengths: list[int], first_id: int = 0, dtype: torch.dtype = torch.float32) -> Spectrogram:
    """Frame t of clip b holds (b, t) and nothing that is 0."""
    rows = [(b + 1, t + 1) for b, n in enumerate(lengths) for t in range(n)]
    return Spectrogram(
        frames=torch.tensor(rows, dtype=dtype).reshape(-1, 2),
        lengths=tuple(lengths),
        cu_frames=cumulative(tuple(lengths), torch.int64, "cpu"),
        clip_ids=torch.arange(len(lengths)) + first_id,
    )


def start_of(seed: int, step: int, clip: int, positions: int) -> int:
    return host_words(seed, step, clip, 1, purpose=Purpose.FRAME_CROP)[0] * positions >> 32


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 45), st.integers(0, 2**48 - 1), st.integers(0, 2**32 - 1))
def test_crops_start_where_the_key_says(lengths: list[int], frames: int, seed: int, step: int) -> None:
    whole = packed(lengths, first_id=1000)
    out = crop_to(whole, frames, StepKey.make(seed, step, "cpu"))
    assert out.lengths == tuple(min(n, frames) for n in lengths)
    assert out.cu_frames.tolist() == [sum(out.lengths[:i]) for i in range(len(lengths) + 1)]
    assert torch.equal(out.clip_ids, whole.clip_ids)
    for i, n in enumerate(lengths):
        start = start_of(seed, step, 1000 + i, n - frames + 1) if n > frames else 0
        assert torch.equal(out.clip(i), whole.clip(i)[start : start + frames])


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 45), st.booleans())
def test_padding_appends_zeros(lengths: list[int], frames: int, keyed: bool) -> None:
    whole = packed(lengths)
    key = StepKey.make(5, 6, "cpu") if keyed else None
    out = pad_to(whole, frames, key)
    cropped = crop_to(whole, frames, key)
    assert out.lengths == (frames,) * len(lengths)
    assert out.frames.shape == (frames * len(lengths), 2)
    assert out.cu_frames.tolist() == [frames * i for i in range(len(lengths) + 1)]
    for i in range(len(lengths)):
        n = cropped.lengths[i]
        assert torch.equal(out.clip(i)[:n], cropped.clip(i))
        assert not out.clip(i)[n:].any()


def test_without_a_key_the_first_frames_stay() -> None:
    whole = packed([9, 3, 5])
    out = crop_to(whole, 4, None)
    assert [out.clip(i)[:, 1].tolist() for i in range(3)] == [[1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 4]]


def test_crop_to_shortest() -> None:
    key = StepKey.make(0, 0, "cpu")
    whole = packed([9, 4, 6])
    out = crop_to_shortest(whole, key)
    assert out.lengths == (4, 4, 4)
    assert torch.equal(out.frames, crop_to(whole, 4, key).frames)
    assert crop_to_shortest(packed([]), key).lengths == ()


def test_a_crop_does_not_depend_on_the_batch() -> None:
    key = StepKey.make(11, 12, "cpu")
    whole = packed([30, 25, 28], first_id=4)
    out = crop_to(whole, 10, key)
    alone = Spectrogram(
        frames=whole.clip(1),
        lengths=(25,),
        cu_frames=cumulative((25,), torch.int64, "cpu"),
        clip_ids=torch.tensor([5]),
    )
    assert torch.equal(crop_to(alone, 10, key).frames, out.clip(1))


def test_every_position_is_equally_likely() -> None:
    """11 positions, 4400 draws over steps: chi-squared with 10 degrees of freedom under its 99.9 % point."""
    starts: Counter[int] = Counter()
    for step in range(40):
        out = crop_to(packed([20] * 110), 10, StepKey.make(1, step, "cpu"))
        starts.update(int(out.clip(i)[0, 1]) - 1 for i in range(110))
    assert set(starts) == set(range(11))
    assert sum((n - 400) ** 2 / 400 for n in starts.values()) < 29.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    assert pad_to(packed([3], dtype=dtype), 5).frames.dtype == dtype


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([8, 20])), max_size=5))
def test_silence_follows_the_samples(clips: list[tuple[int, int]]) -> None:
    """At least 1.25 s each: 10 samples at 8 Hz, 25 at 20 Hz; longer clips stay."""
    parts = [torch.arange(1.0, n + 1) + 100 * i for i, (n, _) in enumerate(clips)]
    audio = AudioBatch(
        samples=torch.cat([torch.empty(0), *parts]),
        lengths=tuple(n for n, _ in clips),
        sample_rates=tuple(rate for _, rate in clips),
        clip_ids=torch.arange(len(clips)),
        starts=torch.zeros(len(clips), dtype=torch.int64),
    )
    out = fill_with_silence(audio, 1.25)
    wanted = [
        torch.cat([p, torch.zeros(max(0, {8: 10, 20: 25}[r] - len(p)))])
        for p, (_, r) in zip(parts, clips, strict=True)
    ]
    assert out.lengths == tuple(len(w) for w in wanted)
    assert torch.equal(out.samples, torch.cat([torch.empty(0), *wanted]))
    assert out.sample_rates == audio.sample_rates
