# SPDX-License-Identifier: Apache-2.0
"""The jitter of the mel filters: its range and distribution, the filters it gives, and none of it in evaluation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from masktrain.config import from_dict, to_dict
from masktrain.errors import ConfigError
from masktrain.frontend.config import FrontendConfig
from masktrain.frontend.frontend import Frontend
from masktrain.frontend.presets import PRESETS, preset
from masktrain.kernels.log_mel import reference
from masktrain.types import AudioBatch, StepKey


def key(step: int, seed: int = 0) -> StepKey:
    return StepKey.make(seed, step, "cpu")


def noise(samples: int, rate: int) -> AudioBatch:
    wave = 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))
    return AudioBatch(wave, (samples,), (rate,), torch.tensor([3]), torch.tensor([0]))


@pytest.mark.parametrize(("name", "least", "most"), [("maskspec", 14_001, 16_000), ("passt", 15_001, 16_000)])
def test_the_published_ranges(name: str, least: int, most: int) -> None:
    """fmin from 0 to 9 and fmax over all of its values, each as likely."""
    config = preset(name)
    draws = [config.drawn(key(step)) for step in range(5_000)]
    low = Counter(spec.fmin for spec in draws)
    assert sorted(low) == list(range(10))
    assert all(abs(count - 500) < 5 * 500**0.5 for count in low.values())
    high = [spec.fmax for spec in draws]
    assert (min(high), max(high)) == (least, most)
    assert all(value == int(value) for value in high)
    tenths = Counter(int((value - least) * 10 / (most - least + 1)) for value in high)
    assert all(abs(tenths[i] - 500) < 5 * 500**0.5 for i in range(10))
    # the two edges are drawn apart
    corner = sum(spec.fmin < 5 and spec.fmax < (least + most) / 2 for spec in draws)
    assert abs(corner - 1250) < 5 * 1250**0.5


def test_a_function_of_seed_and_step() -> None:
    config = preset("maskspec")
    assert config.drawn(key(7)) == config.drawn(key(7)) != config.drawn(key(8))
    assert config.drawn(key(7)) != config.drawn(key(7, seed=1))
    drawn = config.drawn(key(7))
    assert replace(drawn, fmin=config.mel.fmin, fmax=config.mel.fmax) == config.mel


@pytest.mark.parametrize("name", PRESETS)
def test_evaluation_has_none(name: str) -> None:
    config = preset(name)
    assert config.drawn(None) is config.mel
    if name not in ("passt", "maskspec"):
        assert config.drawn(key(5)) is config.mel and config.describe_jitter() == ""
    assert from_dict(FrontendConfig, to_dict(config)) == config


def test_the_frames_are_those_of_the_drawn_filters() -> None:
    config = preset("maskspec")
    batch = noise(40_000, 32_000)
    frontend = Frontend(config)
    frames = frontend(batch, key(3)).frames
    truth, _ = reference.log_mel(batch.samples.double(), (40_000,), config.drawn(key(3)), dtype=torch.float64)
    torch.testing.assert_close(frames.double(), truth, rtol=0, atol=1e-4)
    assert torch.equal(
        frontend(batch).frames, Frontend(replace(config, fmin_jitter=0, fmax_jitter=0))(batch).frames
    )
    # a filter up to 14 kHz or 16 kHz moves the top bins by far more than rounding
    assert float((frontend(batch).frames - frames).abs().max()) > 0.01
    assert torch.equal(frontend(batch, key(3)).frames, frames)


def test_what_is_said() -> None:
    assert preset("maskspec").describe_jitter() == (
        "mel filters from 0 to 9 Hz up to 14001 to 16000 Hz, drawn in each step"
    )


@pytest.mark.parametrize(
    "change",
    [{"fmin_jitter": -1}, {"fmax_jitter": -1}, {"fmax_jitter": 2002}, {"fmin_jitter": 14_002}],
    ids=str,
)
def test_wrong_options(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"frontend\.f"):
        replace(preset("maskspec"), **change)
    assert replace(preset("maskspec"), fmin_jitter=14_001).fmin_jitter == 14_001  # still 14000 below 14001
