# SPDX-License-Identifier: Apache-2.0
"""Windows and mel filter banks, in float64.

Scales and triangles: Kaldi's MelBanks (pytorch/audio:torchaudio/compliance/kaldi.py, get_mel_banks), the HTK
book's mel = 2595 log10(1 + f / 700) = 1127 ln(1 + f / 700), and Slaney's Auditory Toolbox (1998) as librosa
has it (librosa/librosa:librosa/core/convert.py, hz_to_mel; librosa/filters.py, mel).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from masktrain.kernels.log_mel.spec import MelSpec


def window(spec: MelSpec) -> Tensor:
    """Return (win_length,) float64."""
    periodic = spec.window == "hann_periodic"
    size = spec.win_length
    phase = 2 * math.pi * torch.arange(size, dtype=torch.float64) / (size if periodic else size - 1)
    if spec.window == "hamming":
        return 0.54 - 0.46 * phase.cos()
    hann = 0.5 - 0.5 * phase.cos()
    return hann**0.85 if spec.window == "povey" else hann


def centre_frequencies(spec: MelSpec) -> Tensor:
    """Return (n_mels,) float64: the peak of each mel filter in Hz."""
    to_hz = _slaney_hz if spec.mel == "slaney" else _htk_hz
    return to_hz(_edges(spec)[1:-1])


def _edges(spec: MelSpec) -> Tensor:
    """Return (n_mels + 2,) float64: where the triangles begin, peak and end, in mel."""
    to_mel = _slaney_mel if spec.mel == "slaney" else _htk_mel
    ends = to_mel(torch.tensor([spec.fmin, spec.fmax], dtype=torch.float64))
    steps = torch.arange(spec.n_mels + 2, dtype=torch.float64) / (spec.n_mels + 1)
    return ends[0] + (ends[1] - ends[0]) * steps


def mel_filters(spec: MelSpec) -> Tensor:
    """Return the (n_mels, n_fft // 2 + 1) float64 weights of the spectrum's bins."""
    bins = torch.arange(spec.n_fft // 2 + 1, dtype=torch.float64) * spec.sample_rate / spec.n_fft
    slaney = spec.mel == "slaney"
    to_mel, to_hz = (_slaney_mel, _slaney_hz) if slaney else (_htk_mel, _htk_hz)
    edges = _edges(spec)
    if spec.mel == "kaldi":
        weights = _triangles(to_mel(bins), edges)
        weights[:, -1] = 0  # Kaldi leaves the Nyquist bin out
        return weights
    edges = to_hz(edges)
    weights = _triangles(bins, edges)
    if slaney:
        weights = weights * (2 / (edges[2:] - edges[:-2]))[:, None]
    return weights


def _triangles(points: Tensor, edges: Tensor) -> Tensor:
    """Return (len(edges) - 2, len(points)): triangle i rises from edges[i] to 1 at edges[i + 1], falls to
    edges[i + 2]."""
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return torch.minimum((points - left) / (centre - left), (right - points) / (right - centre)).clamp_min(0)


def _htk_mel(hz: Tensor) -> Tensor:
    return 1127 * torch.log1p(hz / 700)


def _htk_hz(mel: Tensor) -> Tensor:
    return 700 * torch.expm1(mel / 1127)


# Slaney's scale: 3 mel per 200 Hz up to 1 kHz, from there 27 mel for each factor of 6.4.
_KNEE_HZ = 1000.0
_KNEE_MEL = 15.0
_LOG_STEP = math.log(6.4) / 27


def _slaney_mel(hz: Tensor) -> Tensor:
    above = _KNEE_MEL + torch.log(hz.clamp_min(_KNEE_HZ) / _KNEE_HZ) / _LOG_STEP
    return torch.where(hz < _KNEE_HZ, hz * 3 / 200, above)


def _slaney_hz(mel: Tensor) -> Tensor:
    above = _KNEE_HZ * torch.exp((mel - _KNEE_MEL) * _LOG_STEP)
    return torch.where(mel < _KNEE_MEL, mel * 200 / 3, above)


@lru_cache(maxsize=32)
def tables(spec: MelSpec, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the (win_length,) float64 window times wave_scale, and the (n_fft // 2 + 1, n_mels) filters in
    `dtype`."""
    weights = mel_filters(spec).T.contiguous().to(dtype)
    # a front end with jitter asks for new ones in each step: the host does not wait for the device
    scaled = window(spec) * spec.wave_scale
    return scaled.to(device, non_blocking=True), weights.to(device, non_blocking=True)
