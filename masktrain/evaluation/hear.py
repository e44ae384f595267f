# SPDX-License-Identifier: Apache-2.0
"""The three functions of the HEAR benchmark (hearbenchmark.com, "API"): this module is a HEAR module as it stands.

Audio is (n_sounds, n_samples) float32 in [-1, 1] at the model's `sample_rate`; embeddings are those of the last encoder
layer, the patches of a time column one after another. Sounds shorter than a patch are filled with zeros to one.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from masktrain.errors import ConfigError, DataError
from masktrain.evaluation.encoder import FrozenEncoder, load_encoder
from masktrain.types import AudioBatch

BATCH = 32
"""Sounds that are encoded together."""
MODEL_VARIABLE = "MASKTRAIN_HEAR_MODEL"
"""Environment variable that names the checkpoint for `load_model()` without an argument."""


class HearModel(nn.Module):
    """A frozen encoder with the attributes that HEAR asks for. It may be moved to a device as any module.

    sample_rate: Hz. scene_embedding_size, timestamp_embedding_size: values of an embedding.
    """

    def __init__(self, encoder: FrozenEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.network = encoder.model
        self.sample_rate = encoder.sample_rate
        self.scene_embedding_size = self.timestamp_embedding_size = encoder.grid.freq * encoder.width

    def forward(self, audio: Tensor) -> Tensor:
        """Return what `get_scene_embeddings` does."""
        return get_scene_embeddings(audio, self)


def load_model(model_file_path: str = "") -> HearModel:
    """Return the model of a run folder or a checkpoint folder, on the CPU.

    model_file_path: the folder; "": the one that the environment variable MASKTRAIN_HEAR_MODEL names. Raises ConfigError
    where neither does, CheckpointError for a folder that is none.
    """
    path = model_file_path or os.environ.get(MODEL_VARIABLE, "")
    if not path:
        raise ConfigError(
            f"load_model: no model was named. Pass a run or checkpoint folder, or set {MODEL_VARIABLE}."
        )
    return HearModel(load_encoder(Path(path), "cpu"))


def get_timestamp_embeddings(audio: Tensor, model: HearModel) -> tuple[Tensor, Tensor]:
    """Return embeddings (n_sounds, n_timestamps, size) float32 and timestamps (n_sounds, n_timestamps) float32, the middle
    of each embedding's window in milliseconds. Raises DataError for audio of another shape, or with NaN or infinity."""
    encoder = model.encoder
    columns, parts = 0, []
    for batch in _checked(audio, encoder).split(BATCH):
        frames = encoder.frames(_batch(batch, encoder), (encoder.n_layers,))
        columns = frames.columns[0]
        parts.append(frames.values[encoder.n_layers].unflatten(0, (len(batch), columns)))
    times = encoder.centres_ms(columns).float().to(parts[0].device)
    return torch.cat(parts), times.expand(len(audio), columns)


def get_scene_embeddings(audio: Tensor, model: HearModel) -> Tensor:
    """Return (n_sounds, size) float32: the mean over time of the timestamp embeddings. Raises DataError likewise."""
    return get_timestamp_embeddings(audio, model)[0].mean(1)


def _checked(audio: Tensor, encoder: FrozenEncoder) -> Tensor:
    if audio.dim() != 2 or not audio.shape[0] or not audio.shape[1]:
        raise DataError(
            f"audio: expected (n_sounds, n_samples), both at least 1; received {tuple(audio.shape)}."
        )
    if not audio.is_floating_point() or not torch.isfinite(audio).all():
        raise DataError(f"audio: expected finite floating-point samples in [-1, 1]; received {audio.dtype}.")
    least = encoder.frontend.min_samples(encoder.sample_rate, encoder.least_frames)
    return nn.functional.pad(audio.float(), (0, max(0, least - audio.shape[1])))


def _batch(audio: Tensor, encoder: FrozenEncoder) -> AudioBatch:
    sounds, samples = audio.shape
    return AudioBatch(
        samples=audio.reshape(-1),
        lengths=(samples,) * sounds,
        sample_rates=(encoder.sample_rate,) * sounds,
        clip_ids=torch.arange(sounds),
        starts=torch.zeros(sounds, dtype=torch.int64),
    )
