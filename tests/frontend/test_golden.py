# SPDX-License-Identifier: Apache-2.0
"""The presets against the log-mel features that the original projects' code computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from masktrain.frontend.frontend import Frontend
from masktrain.frontend.length import pad_to
from masktrain.frontend.presets import preset, published_norm
from masktrain.kernels.log_mel.filters import mel_filters
from masktrain.types import AudioBatch, Spectrogram

# array -> (preset, (mel, time) layout, normalised as the data set items are)
FEATURES = {
    "audiomae_fbank": ("audiomae", False, False),
    "audiomae_item": ("audiomae", False, True),
    "ssast_fbank": ("ssast", False, False),
    "ssast_item": ("ssast", False, True),
    "ast_fbank": ("ast", False, False),
    "ast_item": ("ast", False, True),
    "eat_fbank": ("eat", False, False),
    "eat_norm": ("eat", False, True),
    "mae_ast_fbank": ("mae_ast", False, False),
    "beats_fbank_norm": ("beats", False, True),
    "m2d_lms": ("m2d", True, False),
    "passt_mel": ("passt", True, False),
    "maskspec_mel": ("maskspec", True, False),
}
BANKS = {"kaldi_banks_16k": "ast", "m2d_mel_basis": "m2d"}
NEAR, FAR = 1e-3, 1e-2
"""Tolerance in log units within 80 dB of the frame's maximum or at the floor, and elsewhere."""
NOISE_DB = 100
"""Below the frame's maximum by more than this, the peers' float32 FFTs give rounding noise; only values over
the floor by their scaling (BEATs) lie there, and FAR holds in the units of the array."""


@pytest.fixture(scope="module")
def cases(golden_dir: Path) -> dict[str, dict[str, Tensor]]:
    paths = sorted((golden_dir / "frontend").glob("*.npz"))
    if not paths:
        pytest.skip(f"no golden front ends in {golden_dir / 'frontend'}")
    return {p.stem: {k: torch.from_numpy(v) for k, v in np.load(p).items()} for p in paths}


def spectrogram(wave: Tensor, name: str) -> Spectrogram:
    """The wave between two others in a batch, so that the packed path is what is tested."""
    rate = preset(name).sample_rate
    batch = AudioBatch(
        samples=torch.cat([wave.flip(0)[:5000], wave, wave[:777]]),
        lengths=(5000, len(wave), 777),
        sample_rates=(rate,) * 3,
        clip_ids=torch.arange(3),
        starts=torch.zeros(3, dtype=torch.int64),
    )
    return Frontend(preset(name))(batch)


def units(name: str, item: bool) -> tuple[float, float]:
    """(offset, natural-log units per unit of the array): logs = offset + factor * array."""
    if item:
        norm = published_norm(name)
        return norm.dataset_mean, norm.factor * norm.dataset_std
    mel = preset(name).mel
    return -mel.offset, mel.divisor


def found(cases: dict[str, dict[str, Tensor]], names: dict[str, object]) -> Iterator[tuple[str, str, Tensor]]:
    for case, arrays in cases.items():
        yield from ((case, name, arrays[name]) for name in names if name in arrays)


def test_every_array_is_compared(cases: dict[str, dict[str, Tensor]]) -> None:
    known = {*FEATURES, *BANKS, "wave_16k", "wave_32k"}
    for case, arrays in cases.items():
        assert set(arrays) <= known, f"{case}: {set(arrays) - known}"
        assert set(arrays) & set(FEATURES), case


@pytest.mark.parametrize("feature", FEATURES)
def test_features(cases: dict[str, dict[str, Tensor]], feature: str) -> None:
    name, transposed, item = FEATURES[feature]
    config = preset(name)
    compared = 0
    for case, _, stored in found(cases, {feature: None}):
        wave = cases[case][f"wave_{config.sample_rate // 1000}k"]
        whole = spectrogram(wave, name)
        golden = stored.squeeze(0) if stored.dim() == 3 else stored
        golden = golden.T if transposed else golden
        ours = pad_to(whole, len(golden)).clip(1)
        assert config.frames_for(len(wave), config.sample_rate) == whole.lengths[1]
        real = min(whole.lengths[1], len(golden))
        offset, unit = units(name, item)
        if item:
            ours = (ours - offset) / unit
        assert ours.shape == golden.shape
        # padding: zeros in log-mel units
        torch.testing.assert_close(ours[real:], golden[real:], atol=1e-6, rtol=0)

        ours, golden = ours[:real].double(), golden[:real].double()
        error = (ours - golden).abs() * unit
        logs = offset + unit * golden
        floor = math.log(config.mel.eps)
        below = (logs.amax(1, keepdim=True) - logs) * 10 / math.log(10)
        near = (below <= 80) | (logs <= floor + 1e-3)
        assert near.any()
        assert error[near].max() < NEAR, f"{case}: {error[near].max():.2e} within 80 dB"
        far = error[~near & (below <= NOISE_DB)]
        assert far.numel() == 0 or far.max() < FAR, f"{case}: {far.max():.2e} below 80 dB"
        assert (error / unit if item else error).max() < FAR
        compared += 1
    assert compared, f"no case has {feature}"


@pytest.mark.parametrize("bank", BANKS)
def test_filter_banks(cases: dict[str, dict[str, Tensor]], bank: str) -> None:
    ours = mel_filters(preset(BANKS[bank]).mel)
    for case, _, golden in found(cases, {bank: None}):
        part = ours[:, : golden.shape[1]]
        # the peer's own float32 mel values are off by 1e-4, its triangles 22 wide
        torch.testing.assert_close(
            part, golden.double(), atol=3e-5 if bank == "kaldi_banks_16k" else 1e-8, rtol=0
        )
        assert not ours[:, golden.shape[1] :].any(), case
    assert any(bank in arrays for arrays in cases.values())
