# SPDX-License-Identifier: Apache-2.0
"""The config of a front end, with the arithmetic of its lengths.

It is stored with the weights: every number that changes a log-mel value is in it, so a preset that is changed
later does not change what a trained model sees.
"""

from __future__ import annotations

from dataclasses import dataclass

from masktrain.errors import ConfigError
from masktrain.kernels.log_mel import MelSpec, spec_problem
from masktrain.kernels.resample import resampled_length


@dataclass(frozen=True, kw_only=True)
class FrontendConfig:
    """Waveform at any sample rate to log-mel frames."""

    preset: str
    """The preset that the numbers were taken from (masktrain/frontend/presets.py)."""
    mel: MelSpec
    """The numbers."""

    def __post_init__(self) -> None:
        problem = spec_problem(self.mel)
        if problem:
            raise ConfigError(f"frontend.mel.{problem}")

    @property
    def n_mels(self) -> int:
        """Mel bins of a frame."""
        return self.mel.n_mels

    @property
    def sample_rate(self) -> int:
        """Rate in Hz that waveforms are resampled to."""
        return self.mel.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.mel.sample_rate / self.mel.hop

    def frames_for(self, num_samples: int, rate: int) -> int:
        """Return the frames that `num_samples` samples at `rate` Hz give."""
        return self.mel.frames(resampled_length(num_samples, rate, self.sample_rate))

    def min_samples(self, rate: int, frames: int = 1) -> int:
        """Return the fewest samples at `rate` Hz that give at least `frames` frames."""
        needed = self.mel.samples(frames)
        # ceil(n * target / rate) >= needed exactly if n * target > (needed - 1) * rate
        return (needed - 1) * rate // self.sample_rate + 1 if needed else 0
