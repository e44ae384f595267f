# SPDX-License-Identifier: Apache-2.0
"""Roll and gain of waveforms: their distributions, what they depend on, and that evaluation sees none of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.cli import _main
from masktrain.data.augment import AugmentConfig, augment
from masktrain.kernels.philox import Purpose, host_words
from masktrain.types import AudioBatch, StepKey

BOTH = AugmentConfig(roll=True, gain=True)


def key(step: int = 0, seed: int = 5) -> StepKey:
    return StepKey.make(seed, step, "cpu")


def batch(lengths: Sequence[int], ids: Sequence[int], dtype: torch.dtype = torch.float32) -> AudioBatch:
    """Clips of these lengths, whose samples depend on their ids alone."""
    clips = [
        torch.randn(n, generator=torch.Generator().manual_seed(clip), dtype=torch.float64).to(dtype)
        for n, clip in zip(lengths, ids, strict=True)
    ]
    rates = (16_000,) * len(clips)
    return AudioBatch(
        torch.cat(clips), tuple(lengths), rates, torch.tensor(ids), torch.zeros(len(clips), dtype=torch.int64)
    )


def truth(audio: AudioBatch, step: int, roll: bool, gain: bool) -> torch.Tensor:
    """Each clip by itself in float64, from words made on the host."""
    out = []
    for clip, samples in zip(audio.clip_ids.tolist(), audio.samples.split(list(audio.lengths)), strict=True):
        first, *rest = host_words(5, step, clip, 20, purpose=Purpose.AUGMENT)
        wave = samples.double()
        if roll:
            wave = torch.roll(wave, first * len(wave) // 2**32)
        if gain:
            wave = wave * (0.5 + sorted(rest)[9] / 2**32)
        out.append(wave)
    return torch.cat(out)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 7, 400]), min_size=1, max_size=5),
    first=st.integers(0, 2**40),
    step=st.integers(0, 2**32 - 1),
    roll=st.booleans(),
    gain=st.booleans(),
)
def test_against_each_clip_by_itself(
    lengths: list[int], first: int, step: int, roll: bool, gain: bool
) -> None:
    ids = [first + 3 * i for i in range(len(lengths))]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
        audio = batch(lengths, ids, dtype)
        found = augment(audio, AugmentConfig(roll=roll, gain=gain), key(step))
        expected = truth(audio, step, roll, gain)
        assert found.samples.dtype == dtype and found.lengths == audio.lengths
        torch.testing.assert_close(found.samples.double(), expected, rtol=tolerance, atol=0)
        if not gain:
            assert torch.equal(found.samples.double(), expected)


def test_nothing_asked_for_is_nothing_done() -> None:
    audio = batch([10, 20], [0, 1])
    assert augment(audio, AugmentConfig(), key()) is audio
    assert AugmentConfig().describe() == ""
    assert BOTH.describe() == "roll and gain 0.5 + Beta(10, 10)"


def test_a_clip_does_not_depend_on_its_batch() -> None:
    together = augment(batch([50, 70, 90], [4, 9, 2]), BOTH, key(3)).samples.split([50, 70, 90])
    alone = augment(batch([70], [9]), BOTH, key(3)).samples
    assert torch.equal(together[1], alone)
    assert not torch.equal(augment(batch([70], [9]), BOTH, key(4)).samples, alone)
    assert not torch.equal(augment(batch([70], [9]), BOTH, key(3, seed=6)).samples, alone)


def test_every_roll_is_as_likely() -> None:
    """11 samples, 22000 clips: a ramp shows the roll."""
    clips = 22_000
    ramp = torch.arange(11.0).repeat(clips)
    ids = torch.arange(clips)
    audio = AudioBatch(ramp, (11,) * clips, (16_000,) * clips, ids, torch.zeros_like(ids))
    rolled = augment(audio, AugmentConfig(roll=True), key()).samples.view(clips, 11)
    shifts = Counter(((11 - rolled[:, 0].long()) % 11).tolist())
    chi_square = sum((shifts[i] - 2000) ** 2 / 2000 for i in range(11))
    assert chi_square < 29.6  # 99.9 % of 10 degrees of freedom
    assert torch.equal(rolled.sort(dim=1).values, ramp.view(clips, 11))


def test_the_gain_is_half_plus_beta() -> None:
    """Kolmogorov and Smirnov against the distribution function of Beta(10, 10), which is a sum of binomials."""
    clips = 20_000
    ids = torch.arange(clips)
    ones = torch.ones(clips, dtype=torch.float64)
    audio = AudioBatch(ones, (1,) * clips, (16_000,) * clips, ids, torch.zeros_like(ids))
    beta = (augment(audio, AugmentConfig(gain=True), key()).samples - 0.5).sort().values
    assert 0 < float(beta[0]) < float(beta[-1]) < 1
    cdf = sum(math.comb(19, k) * beta**k * (1 - beta) ** (19 - k) for k in range(10, 20))
    steps = torch.arange(clips + 1, dtype=torch.float64) / clips
    distance = torch.maximum((cdf - steps[:-1]).abs(), (cdf - steps[1:]).abs()).max()
    assert float(distance) < 1.95 / clips**0.5  # 99.9 %


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits() -> None:
    audio = batch([30_000, 1, 777], [1, 2, 3])
    there = replace(audio, samples=audio.samples.cuda(), clip_ids=audio.clip_ids.cuda())
    at = StepKey.make(5, 9, "cuda")
    augment(there, BOTH, at)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment(there, BOTH, at)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.samples.cpu(), augment(audio, BOTH, key(9)).samples, rtol=1e-6, atol=0)


def test_a_run_augments_its_training_alone(tmp_path: Path) -> None:
    """Also in two micro-batches, which are the same step."""
    clips = runs.make_clips(tmp_path / "audio", 24)
    base = ["run", "--recipe", "mae_ast_frame", *runs.SMALL, "--steps", "2", "--data", str(clips)]
    base += ["--model.encoder-layerdrop", "0"]
    losses, held_out = {}, {}
    for name, more in {
        "plain": [],
        "both": ["--augment.roll", "--augment.gain"],
        "micro": ["--augment.roll", "--augment.gain", "--train.accumulation", "2"],
    }.items():
        out = tmp_path / name
        assert _main([*base, *more, "--out", str(out)]) == 0
        losses[name] = [row["loss"] for row in runs.rows(out)]
        held_out[name] = json.loads((out / "validation.jsonl").read_text().splitlines()[0])["loss"]
    assert held_out["plain"] == held_out["both"] == held_out["micro"]
    assert abs(losses["both"][0] / losses["plain"][0] - 1) > 1e-4
    assert losses["micro"] == pytest.approx(losses["both"], rel=1e-5)
