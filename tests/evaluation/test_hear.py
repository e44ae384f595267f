# SPDX-License-Identifier: Apache-2.0
"""The contract of the HEAR benchmark's API."""

from __future__ import annotations

from pathlib import Path

import encoders
import pytest
import torch

from masktrain.errors import CheckpointError, ConfigError, DataError
from masktrain.evaluation import hear


@pytest.fixture(scope="module", params=("mae_ast_frame", "msm_mae", "maskspec"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> hear.HearModel:
    return hear.load_model(str(encoders.save(tmp_path_factory.mktemp("hear"), request.param)))


def test_shapes_times_and_types(model: hear.HearModel) -> None:
    rate = model.sample_rate
    assert isinstance(model, torch.nn.Module) and rate in (16000, 22050, 32000, 44100, 48000)
    audio = torch.randn(3, round(1.3 * rate)).clamp(-1, 1)
    frames, times = hear.get_timestamp_embeddings(audio, model)
    scenes = hear.get_scene_embeddings(audio, model)
    assert frames.dtype == times.dtype == scenes.dtype == torch.float32
    assert frames.shape[::2] == (3, model.timestamp_embedding_size) and times.shape == frames.shape[:2]
    assert scenes.shape == (3, model.scene_embedding_size)
    assert torch.equal(times[0], times[2]) and bool((times.diff() > 0).all())
    assert times.min() >= 0 and times.max() <= 1300
    step = 1000 * model.encoder.grid.patch_time / model.encoder.frontend.frame_rate
    assert torch.allclose(times.diff(), torch.full_like(times.diff(), step), atol=1e-3)
    assert not frames.requires_grad and torch.equal(model(audio), scenes)


def test_sounds_are_independent_and_batched(model: hear.HearModel, monkeypatch: pytest.MonkeyPatch) -> None:
    audio = torch.randn(5, round(0.6 * model.sample_rate)).clamp(-1, 1)
    together = hear.get_scene_embeddings(audio, model)
    monkeypatch.setattr(hear, "BATCH", 2)
    assert torch.allclose(hear.get_scene_embeddings(audio, model), together, atol=2e-5)
    assert torch.allclose(hear.get_scene_embeddings(audio[3:4], model)[0], together[3], atol=2e-5)


def test_any_length(model: hear.HearModel) -> None:
    for samples in (1, 100, 12 * model.sample_rate):
        frames, times = hear.get_timestamp_embeddings(torch.rand(1, samples) - 0.5, model)
        assert frames.isfinite().all() and frames.shape[1] == times.shape[1] >= 1


def test_refusals(model: hear.HearModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for audio in (torch.rand(100), torch.rand(0, 100), torch.rand(2, 0), torch.full((1, 100), torch.nan)):
        with pytest.raises(DataError, match="audio: expected"):
            hear.get_scene_embeddings(audio, model)
    with pytest.raises(DataError, match="int16"):
        hear.get_scene_embeddings(torch.zeros(1, 100, dtype=torch.int16), model)
    monkeypatch.delenv(hear.MODEL_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=hear.MODEL_VARIABLE):
        hear.load_model()
    monkeypatch.setenv(hear.MODEL_VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match="absent"):
        hear.load_model()
