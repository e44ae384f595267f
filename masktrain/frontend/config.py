# SPDX-License-Identifier: Apache-2.0
"""The config of a front end, with the arithmetic of its lengths.

It is stored with the weights: every number that changes a log-mel value is in it, so a preset that is changed
later does not change what a trained model sees.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from masktrain.errors import ConfigError
from masktrain.kernels.log_mel import MelSpec, spec_problem
from masktrain.kernels.philox import Purpose, host_words
from masktrain.kernels.resample import resampled_length
from masktrain.types import StepKey


@dataclass(frozen=True, kw_only=True)
class FrontendConfig:
    """Waveform at any sample rate to log-mel frames."""

    preset: str
    """The preset that the numbers were taken from (masktrain/frontend/presets.py)."""
    mel: MelSpec
    """The numbers."""
    fmin_jitter: int = 0
    """In training each step adds 0 to fmin_jitter - 1 Hz to mel.fmin; 0: none."""
    fmax_jitter: int = 0
    """In training each step adds fmax_jitter / 2 Hz less 0 to fmax_jitter - 1 Hz to mel.fmax; 0: none."""

    def __post_init__(self) -> None:
        problem = spec_problem(self.mel)
        if problem:
            raise ConfigError(f"frontend.mel.{problem}")
        for name in ("fmin_jitter", "fmax_jitter"):
            if getattr(self, name) < 0:
                raise ConfigError(f"frontend.{name}: must be at least 0; received {getattr(self, name)}.")
        highest_fmin, lowest_fmax = self._edges(self.fmin_jitter - 1, self.fmax_jitter - 1)
        highest_fmax, nyquist = self._edges(0, 0)[1], self.sample_rate / 2
        if highest_fmin >= lowest_fmax or highest_fmax > nyquist:
            raise ConfigError(
                f"frontend.fmin_jitter, frontend.fmax_jitter: {self.fmin_jitter} and {self.fmax_jitter} draw filters "
                f"between {highest_fmin:g} and {lowest_fmax:g} Hz or up to {highest_fmax:g} Hz; allowed are filters "
                f"between edges in ascending order up to {nyquist:g} Hz. Lower the jitter."
            )

    def _edges(self, below: int, above: int) -> tuple[float, float]:
        """Return fmin and fmax of the draw (below, above), each from 0 to its jitter - 1."""
        return self.mel.fmin + max(0, below), self.mel.fmax + self.fmax_jitter // 2 - max(0, above)

    def drawn(self, key: StepKey | None) -> MelSpec:
        """Return the numbers of a training step, or for None those of evaluation, which are `mel`.

        fmin and fmax are drawn as kkoutini/PaSST:models/preprocess.py does: one draw for all clips and ranks, words 0
        and 1 of stream 0 of (seed, MEL_JITTER, step).
        """
        if key is None or not (self.fmin_jitter or self.fmax_jitter):
            return self.mel
        below, above = host_words(key.seed, key.step, 0, 2, purpose=Purpose.MEL_JITTER)
        fmin, fmax = self._edges((below * self.fmin_jitter) >> 32, (above * self.fmax_jitter) >> 32)
        return replace(self.mel, fmin=fmin, fmax=fmax)

    def describe_jitter(self) -> str:
        """Return the line of the start block, "" where there is no jitter."""
        if not (self.fmin_jitter or self.fmax_jitter):
            return ""
        first, last = self._edges(0, self.fmax_jitter - 1), self._edges(self.fmin_jitter - 1, 0)
        low, high = f"{first[0]:g} to {last[0]:g}", f"{first[1]:g} to {last[1]:g}"
        return f"mel filters from {low} Hz up to {high} Hz, drawn in each step"

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
