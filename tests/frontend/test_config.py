# SPDX-License-Identifier: Apache-2.0
"""Front-end configs: lengths, storage, presets, mistakes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masktrain.config import from_dict, to_dict
from masktrain.errors import ConfigError
from masktrain.frontend.config import FrontendConfig
from masktrain.frontend.presets import PRESETS, PUBLISHED_NORMS, preset, published_norm

RATES = st.sampled_from([1_000, 8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000, 192_000, 44_101])


@given(st.sampled_from(PRESETS), RATES, st.integers(1, 2000))
def test_min_samples_is_the_least(name: str, rate: int, frames: int) -> None:
    config = preset(name)
    n = config.min_samples(rate, frames)
    assert config.frames_for(n, rate) >= frames
    assert config.frames_for(n - 1, rate) < frames


def test_lengths_of_the_papers() -> None:
    assert preset("audiomae").frames_for(441_000, 44_100) == 998
    assert preset("m2d").frames_for(160_000, 16_000) == 1001
    assert preset("passt").frames_for(320_000, 32_000) == 1000
    assert preset("mae_ast").frames_for(399, 16_000) == 0
    assert preset("ast").min_samples(16_000) == 400
    assert preset("ast").min_samples(44_100, 0) == 0
    assert preset("ast").frame_rate == preset("maskspec").frame_rate == 100
    assert (preset("m2d").n_mels, preset("m2d").sample_rate) == (80, 16_000)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_survives_its_json(name: str) -> None:
    config = preset(name)
    assert config.preset == name
    assert from_dict(FrontendConfig, to_dict(config)) == config


def test_numbers_travel_with_the_name() -> None:
    changed = replace(preset("eat"), mel=replace(preset("eat").mel, n_mels=64))
    assert from_dict(FrontendConfig, to_dict(changed)).n_mels == 64


def test_mistakes_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"no preset 'audiomea'. Did you mean 'audiomae'\? Allowed: audiomae, ssast"
    ):
        preset("audiomea")
    with pytest.raises(ConfigError, match=r"frontend.mel.fmin, fmax: must satisfy .* received 20 and 9000"):
        replace(preset("ast"), mel=replace(preset("ast").mel, fmax=9000.0))
    with pytest.raises(
        ConfigError, match="'passt' has no published statistics of 'audioset'; there are: none"
    ):
        published_norm("passt")
    with pytest.raises(ConfigError, match="there are: audioset, esc50, speech_commands"):
        published_norm("ast", "fsd50k")


def test_published_statistics() -> None:
    assert set(PUBLISHED_NORMS) <= set(PRESETS)
    assert published_norm("audiomae").dataset_mean == -4.2677393
    assert published_norm("eat").dataset_std == 4.569
    assert published_norm("ast", "esc50").factor == 2
    assert published_norm("m2d").factor == 1
    assert all(n.dataset_std > 0 and n.source for norms in PUBLISHED_NORMS.values() for n in norms.values())
