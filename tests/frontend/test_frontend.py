# SPDX-License-Identifier: Apache-2.0
"""The front end on batches of mixed rates and on real audio."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import masktrain.frontend.frontend
from masktrain.frontend.frontend import Frontend
from masktrain.frontend.presets import PRESETS, preset
from masktrain.types import AudioBatch


def batch(clips: list[tuple[torch.Tensor, int]]) -> AudioBatch:
    return AudioBatch(
        samples=torch.cat([c for c, _ in clips]) if clips else torch.empty(0),
        lengths=tuple(len(c) for c, _ in clips),
        sample_rates=tuple(rate for _, rate in clips),
        clip_ids=torch.arange(len(clips)) * 7 + 3,
        starts=torch.zeros(len(clips), dtype=torch.int64),
    )


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(PRESETS),
    st.lists(
        st.tuples(st.integers(0, 9000), st.sampled_from([8_000, 16_000, 32_000, 44_100, 48_000])), max_size=5
    ),
)
def test_batches_are_their_clips(name: str, shapes: list[tuple[int, int]]) -> None:
    frontend = Frontend(preset(name))
    g = torch.Generator().manual_seed(len(shapes))
    clips = [(0.1 * torch.randn(n, generator=g), rate) for n, rate in shapes]
    out = frontend(batch(clips))
    assert out.frames.dtype == torch.float32
    assert out.lengths == tuple(frontend.config.frames_for(n, rate) for n, rate in shapes)
    assert out.frames.shape == (sum(out.lengths), frontend.config.n_mels)
    assert out.cu_frames.tolist() == [sum(out.lengths[:i]) for i in range(len(shapes) + 1)]
    assert out.cu_frames.dtype == torch.int64
    assert out.clip_ids.tolist() == [7 * i + 3 for i in range(len(shapes))]
    for i, clip in enumerate(clips):
        assert torch.equal(out.clip(i), frontend(batch([clip])).frames)


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_a_tone_lies_in_the_same_bin_and_frames_at_any_rate(rate: int) -> None:
    """A chirp's log-mel does not depend on the rate that it was recorded at, nor is it shifted in time."""

    def chirp(rate: int) -> torch.Tensor:
        t = torch.arange(2 * rate, dtype=torch.float64) / rate
        return 0.3 * torch.sin(2 * math.pi * (200 * t + 600 * t**2)).float()

    frontend = Frontend(preset("audiomae"))
    low = frontend(batch([(chirp(rate), rate)])).frames
    high = frontend(batch([(chirp(16_000), 16_000)])).frames
    loud = high > high.amax(1, keepdim=True) - math.log(1e4)
    assert len(low) == len(high)
    assert (low - high)[2:-2][loud[2:-2]].abs().max() < 0.02


def test_chunks_of_a_batch_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(9000, 8_000), (0, 16_000), (300, 44_100), (50_000, 44_100), (7000, 16_000), (0, 8_000)]
    whole = batch([(0.1 * torch.randn(n), rate) for n, rate in shapes])
    frontend = Frontend(preset("m2d"))
    expected = frontend(whole)
    monkeypatch.setattr(masktrain.frontend.frontend, "CHUNK_SAMPLES", {"cpu": 10_000})
    out = frontend(whole)
    assert out.lengths == expected.lengths
    assert torch.equal(out.frames, expected.frames)


def test_real_clips_against_float64(data_dir: Path) -> None:
    sf = pytest.importorskip("soundfile")
    paths = sorted(data_dir.glob("esc10/*/*.ogg"))[::40] + sorted(data_dir.glob("fsdd/**/*.wav"))[::200]
    assert len(paths) >= 20
    read = [sf.read(p, dtype="float32") for p in paths]
    clips = [(torch.from_numpy(samples), rate) for samples, rate in read]
    assert {rate for _, rate in clips} == {8_000, 44_100}
    low = batch(clips)
    for name in ("audiomae", "mae_ast", "m2d", "maskspec"):
        frontend = Frontend(preset(name))
        high = frontend(replace(low, samples=low.samples.double()))
        assert (low.samples.dtype, high.frames.dtype) == (torch.float32, torch.float64)
        error = (frontend(low).frames - high.frames).abs().max() * frontend.config.mel.divisor
        assert error < 1e-4, f"{name}: {error:.1e}"
