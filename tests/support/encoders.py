# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with small random encoders, and labelled audio, for tests of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile
import torch

from masktrain.config import to_dict
from masktrain.models import registry
from masktrain.recipes import find
from masktrain.training import checkpoint
from masktrain.types import AudioBatch

RECIPES = ("mae_ast_frame", "mae_ast_patch", "ssast_patch", "maskspec", "msm_mae", "audiomae")


def save(folder: Path, name: str, seed: int = 1, step: int = 5, **data: object) -> Path:
    """Write a run folder with two encoder layers of random weights and input statistics; data: fields of DataConfig."""
    recipe = find(name, "tiny")
    recipe = replace(
        recipe,
        model=replace(recipe.model, encoder_layers=2, decoder_layers=1)
        if hasattr(recipe.model, "decoder_layers")
        else replace(recipe.model, encoder_layers=2),
        data=replace(recipe.data, **data),
    )
    torch.manual_seed(seed)
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for key, tensor in state.items():
        if key.startswith("input_norm."):
            tensor.copy_(torch.rand_like(tensor) + (1.0 if "std" in key or "var" in key else -6.0))
    saved = {"recipe": recipe.name, "recipe_config": to_dict(recipe)}
    checkpoint.save(folder / "checkpoints", step, {"model": state}, saved, keep_last=1)
    return folder


def tone(seconds: float, rate: int, seed: int) -> np.ndarray:
    """Return (n,) float32: a decaying tone in noise, another for each seed."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    pitch = generator.uniform(150, 3000)
    wave = 0.4 * np.sin(2 * np.pi * pitch * time) * np.exp(-time * generator.uniform(0.5, 4))
    return (wave + 0.02 * generator.standard_normal(len(time))).astype(np.float32)


def batch(lengths: Sequence[float], rate: int = 16000, seed: int = 0) -> AudioBatch:
    """Return a batch of tones of so many seconds."""
    waves = [tone(seconds, rate, seed + i) for i, seconds in enumerate(lengths)]
    return AudioBatch(
        samples=torch.from_numpy(np.concatenate(waves)),
        lengths=tuple(map(len, waves)),
        sample_rates=(rate,) * len(waves),
        clip_ids=torch.arange(len(waves)),
        starts=torch.zeros(len(waves), dtype=torch.int64),
    )


def write_tones(folder: Path, names: Sequence[str], seconds: float | Sequence[float] = 0.3) -> None:
    """Write a sound of its own for each name below `folder`, mono at 16 kHz."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        length = seconds if isinstance(seconds, float) else seconds[i]
        soundfile.write(path, tone(length, 16000, i), 16000)


def write_manifest(folder: Path, rows: Sequence[Sequence[object]], header: str = "path,label,fold") -> Path:
    """Write a CSV of rows, the first value a path below `folder`."""
    path = folder / "clips.csv"
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path
