# SPDX-License-Identifier: Apache-2.0
"""log_mel by the native library, as one torch op: float64 up to the mel sums, float32 results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels.log_mel.filters import mel_filters, window
from masktrain.kernels.log_mel.spec import MelSpec

FUNCTIONS = {torch.float32: "mt_log_mel_f32", torch.float64: "mt_log_mel_f64"}
LARGEST_FFT = 1 << 14
"""Beyond it the frames of one vector no longer fit a core's cache."""

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "log_mel(Tensor samples, SymInt[] lengths, SymInt[] counts, Tensor window, Tensor roots, Tensor bands, "
    "Tensor weights, SymInt hop, SymInt lead, bool remove_mean, bool remove_dc, float wave_preemphasis, "
    "float frame_preemphasis, bool magnitude, bool floor, float eps, float offset, float divisor) -> Tensor"
)


def why_not(samples: Tensor, spec: MelSpec, dtype: torch.dtype) -> str | None:
    """Return None if the native library serves these arguments of `op.log_mel`, else why not."""
    if samples.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {samples.device}"
    if dtype != torch.float32:
        return f"the native library gives float32, not {dtype}"
    if spec.power not in (1.0, 2.0):
        return f"the native library has the powers 1 and 2, not {spec.power:g}"
    if spec.eps < torch.finfo(torch.float32).tiny:
        return f"the native library takes eps that is a normal float32, not {spec.eps:g}"
    rest = spec.n_fft // 2
    for prime in (2, 3, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1 or spec.n_fft > LARGEST_FFT:
        return f"the native library transforms 2 * 2^a 3^b 5^c samples up to {LARGEST_FFT}, not {spec.n_fft}"
    return _native.why_not()


def log_mel(
    samples: Tensor, lengths: tuple[int, ...], spec: MelSpec, *, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...]]:
    """See op.py."""
    del dtype  # float32, as why_not demands
    counts = tuple(spec.frames(n) for n in lengths)
    lead = spec.n_fft // 2 - (spec.n_fft - spec.win_length) // 2 if spec.framing == "centre" else 0
    out = torch.ops.masktrain.log_mel(
        samples,
        lengths,
        counts,
        *tables(spec),
        spec.hop,
        lead,
        spec.remove_mean,
        spec.remove_dc,
        spec.wave_preemphasis,
        spec.frame_preemphasis,
        spec.power == 1,
        spec.log == "max",
        spec.eps,
        spec.offset,
        spec.divisor,
    )
    return out, counts


@lru_cache(maxsize=32)
def tables(spec: MelSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the native function reads.

    The (win_length,) float64 window times wave_scale; the (n_fft, 2) float64 roots of unity exp(-2 pi i t /
    n_fft); (2, n_mels) int64: the first bin of each filter and its number of bins from there to its last; and
    the float64 weights of these bins, one filter after the other.
    """
    phase = torch.arange(spec.n_fft, dtype=torch.float64) * (2 * math.pi / spec.n_fft)
    filters = mel_filters(spec)
    bands, weights = [], []
    for row in filters:
        used = row.nonzero()[:, 0]
        first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 0)
        bands.append((first, last - first))
        weights.append(row[first:last])
    return (
        window(spec) * spec.wave_scale,
        torch.stack([phase.cos(), -phase.sin()], dim=1),
        torch.tensor(bands).T.contiguous(),
        torch.cat(weights),
    )


@torch.library.impl(_library, "log_mel", "CPU")
def _log_mel(
    samples: Tensor,
    lengths: Sequence[int],
    counts: Sequence[int],
    window: Tensor,
    roots: Tensor,
    bands: Tensor,
    weights: Tensor,
    hop: int,
    lead: int,
    remove_mean: bool,
    remove_dc: bool,
    wave_preemphasis: float,
    frame_preemphasis: float,
    magnitude: bool,
    floor: bool,
    eps: float,
    offset: float,
    divisor: float,
) -> Tensor:
    samples = samples.contiguous()
    clips, n_fft, n_mels, threads = len(lengths), roots.shape[0], bands.shape[1], _native.threads()
    ends = torch.tensor([[0, *accumulate(lengths)], [0, *accumulate(counts)]])
    out = samples.new_empty((sum(counts), n_mels), dtype=torch.float32)
    workspace = torch.empty(clips + threads * (17 * n_fft + 4 * n_mels + 128), dtype=torch.float64)
    getattr(_native.require(), FUNCTIONS[samples.dtype])(
        out.data_ptr(),
        samples.data_ptr(),
        ends[0].data_ptr(),
        ends[1].data_ptr(),
        clips,
        window.data_ptr(),
        window.shape[0],
        roots.data_ptr(),
        n_fft,
        hop,
        lead,
        remove_mean,
        remove_dc,
        wave_preemphasis,
        frame_preemphasis,
        magnitude,
        bands[0].data_ptr(),
        bands[1].data_ptr(),
        weights.data_ptr(),
        n_mels,
        floor,
        eps,
        offset,
        divisor,
        workspace.data_ptr(),
        threads,
    )
    return out


@torch.library.register_fake("masktrain::log_mel", lib=_library)
def _log_mel_fake(
    samples: Tensor,
    lengths: Sequence[int],
    counts: Sequence[int],
    window: Tensor,
    roots: Tensor,
    bands: Tensor,
    *numbers: float,
) -> Tensor:
    return samples.new_empty((sum(counts), bands.shape[1]), dtype=torch.float32)
