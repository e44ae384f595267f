# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a model of EVAR (nttcslab/eval-audio-repr): the wrapper class and the YAML that its scripts take.

EVAR finds a model as config/NAME.yaml, whose `audio_repr` names a class in a file of its folder evar/, with
`forward(batch_audio)`, (B, samples) to (B, D), and `encode_frames`, to (B, D, T) (evar/ar_base.py there). The wrapper
imports the installed masktrain, so front end, normalisation, windows and pooling are those of `masktrain evaluate`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from masktrain.errors import ConfigError
from masktrain.evaluation.encoder import FrozenEncoder
from masktrain.training import storage

WRAPPER, CONFIG = "ar_masktrain.py", "masktrain.yaml"
RATES = (16000, 22000, 32000, 44100, 48000)
"""Sample rates that EVAR prepares its data at (evar/ds_tasks.py)."""
LEARNING_RATE = 3e-4
"""Of EVAR's linear layer, for all models but M2D (config/*.yaml): it searches none."""

_CODE = '''# SPDX-License-Identifier: Apache-2.0
"""EVAR wrapper for encoders trained with masktrain. Put this file into evar/ of eval-audio-repr.

For linear evaluation: the encoder is frozen, and its embeddings carry no gradient. `weight_file` of the config names the
run or checkpoint folder. The input norm is in the checkpoint, so nothing is measured on the task's data.
"""

import torch
from evar.ar_base import BaseAudioRepr
from masktrain.evaluation.hear import get_timestamp_embeddings, load_model


class AR_MASKTRAIN(BaseAudioRepr):
    def __init__(self, cfg):
        super().__init__(cfg=cfg)
        self.body = load_model(str(cfg.weight_file)).eval()
        if cfg.sample_rate != self.body.sample_rate:
            raise ValueError(f"sample_rate is {cfg.sample_rate}, the encoder needs {self.body.sample_rate}")

    def encode_frames(self, batch_audio):
        frames, _ = get_timestamp_embeddings(batch_audio, self.body)
        return frames.transpose(1, 2)

    def forward(self, batch_audio):
        return self.encode_frames(batch_audio).mean(dim=-1)
'''


def wrapper_files(encoder: FrozenEncoder, checkpoint: Path) -> dict[str, str]:
    """Return {file name: text} of the wrapper and of its config.

    Raises ConfigError for a front end of a sample rate that EVAR has no data at.
    """
    mel = encoder.frontend.mel
    if mel.sample_rate not in RATES:
        raise ConfigError(
            f"--as evar: EVAR prepares audio at {', '.join(map(str, RATES))} Hz, and this front end takes "
            f"{mel.sample_rate} Hz."
        )
    values = {
        "audio_repr": "ar_masktrain.AR_MASKTRAIN",
        "weight_file": os.path.abspath(checkpoint),
        "feature_d": encoder.grid.freq * encoder.width,
        "sample_rate": mel.sample_rate,
        "n_fft": mel.n_fft,
        "window_size": mel.win_length,
        "hop_size": mel.hop,
        "n_mels": mel.n_mels,
        "f_min": mel.fmin,
        "f_max": mel.fmax,
        "temporal_pooling_type": "mean",
        "batch_size": 64,
        "lr_lineareval": LEARNING_RATE,
        "report_per_epochs": 20,
        "early_stop_epochs": 20,
    }
    lines = [
        f"# {encoder.name}, for nttcslab/eval-audio-repr: put this file into config/, {WRAPPER} into evar/",
        "# python 2pass_lineareval.py config/masktrain.yaml esc50",
        # JSON scalars are YAML scalars
        *(f"{name}: {json.dumps(value)}" for name, value in values.items()),
    ]
    return {WRAPPER: _CODE, CONFIG: "\n".join(lines) + "\n"}


def write_wrapper(folder: Path, files: dict[str, str]) -> None:
    """Write the files into a new folder. Raises RunError where they cannot be written."""
    for name, text in files.items():
        storage.write_atomic(folder / name, text.encode())
