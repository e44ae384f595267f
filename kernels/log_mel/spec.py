# SPDX-License-Identifier: Apache-2.0
"""What a log-mel front end is: every number that changes its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Window = Literal["hann", "hann_periodic", "hamming", "povey"]
Framing = Literal["snip", "centre"]
MelFamily = Literal["kaldi", "htk", "slaney"]
LogForm = Literal["max", "add"]


@dataclass(frozen=True, kw_only=True)
class MelSpec:
    """A log-mel front end, from mono samples in [-1, 1] to natural logarithms.

    In this order: scale, mean removal, waveform pre-emphasis, framing, DC removal per frame, pre-emphasis per
    frame, window, zero padding to n_fft, |FFT|^power, mel filters, logarithm, (x + offset) / divisor.
    """

    sample_rate: int
    """Hz."""
    n_fft: int
    """FFT length in samples, even."""
    win_length: int
    """Samples of a frame, at most n_fft."""
    hop: int
    """Samples from frame to frame."""
    window: Window
    """Symmetric unless it says periodic; povey is the symmetric Hann window to the power 0.85."""
    framing: Framing
    """snip: only whole frames. centre: frame t is centred on sample t * hop, with reflected ends."""
    wave_scale: float = 1.0
    """Factor of the waveform."""
    remove_mean: bool = False
    """Subtract the mean of the whole clip. Without effect where remove_dc is on."""
    wave_preemphasis: float = 0.0
    """a in y[n] = x[n + 1] - a x[n], one sample shorter; 0 is off."""
    remove_dc: bool = False
    """Subtract the mean of each frame."""
    frame_preemphasis: float = 0.0
    """a in y[i] = x[i] - a x[i - 1] inside a frame, with x[-1] = x[0]; 0 is off."""
    power: float = 2.0
    """Exponent of the magnitude: 2 is the power spectrum."""
    mel: MelFamily
    """kaldi: HTK scale, triangles in mel. htk: HTK scale, triangles in Hz. slaney: Slaney's scale, triangles
    in Hz of area 1 (in Hz, times 2)."""
    n_mels: int
    """Mel bins."""
    fmin: float
    """Lower edge of the first filter in Hz."""
    fmax: float
    """Upper edge of the last filter in Hz."""
    log: LogForm
    """max: ln(max(x, eps)). add: ln(x + eps)."""
    eps: float
    """Floor of the logarithm."""
    offset: float = 0.0
    """Added to the logarithm."""
    divisor: float = 1.0
    """Divides the sum of logarithm and offset."""

    def frames(self, samples: int) -> int:
        """Return the frames of a clip of `samples` samples at sample_rate: 0 where it is too short for
        one."""
        if self.wave_preemphasis:
            samples -= 1
        if self.framing == "snip":
            return max(0, 1 + (samples - self.win_length) // self.hop)
        return 1 + samples // self.hop if samples >= 1 else 0

    def samples(self, frames: int) -> int:
        """Return the fewest samples at sample_rate that give `frames` frames."""
        if frames <= 0:
            return 0
        first = self.win_length if self.framing == "snip" else 1
        extra = 1 if self.wave_preemphasis else 0
        return (
            max(first, self.hop * (frames - 1) + (self.win_length if self.framing == "snip" else 0)) + extra
        )


_CHOICES = {"window": Window, "framing": Framing, "mel": MelFamily, "log": LogForm}


def spec_problem(spec: MelSpec) -> str | None:
    """Return what is wrong with `spec` as 'field: must be ..., received ...', or None."""
    for name, allowed in _CHOICES.items():
        if getattr(spec, name) not in get_args(allowed):
            return f"{name}: must be one of {', '.join(get_args(allowed))}; received {getattr(spec, name)!r}."
    for name, least in (("sample_rate", 1), ("win_length", 2), ("hop", 1), ("n_mels", 1)):
        if getattr(spec, name) < least:
            return f"{name}: must be at least {least}; received {getattr(spec, name)}."
    if spec.n_fft % 2 or spec.n_fft < spec.win_length:
        return f"n_fft: must be even and at least win_length ({spec.win_length}); received {spec.n_fft}."
    nyquist = spec.sample_rate / 2
    if not 0 <= spec.fmin < spec.fmax <= nyquist:
        return (
            f"fmin, fmax: must satisfy 0 <= fmin < fmax <= {nyquist:g} Hz, half of sample_rate; received "
            f"{spec.fmin:g} and {spec.fmax:g}."
        )
    for name in ("wave_preemphasis", "frame_preemphasis"):
        if not 0 <= getattr(spec, name) < 1:
            return f"{name}: must lie in [0, 1); received {getattr(spec, name)}."
    for name in ("wave_scale", "power", "eps", "divisor"):
        if not getattr(spec, name) > 0:
            return f"{name}: must be greater than 0; received {getattr(spec, name)}."
    return None
