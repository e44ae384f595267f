# SPDX-License-Identifier: Apache-2.0
"""The definition of log_mel in plain PyTorch, over the frames of all clips at once."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from masktrain.kernels._float32 import full_float32
from masktrain.kernels.log_mel.filters import tables
from masktrain.kernels.log_mel.spec import MelSpec

ROWS = 16
"""Frames of a chunk are a multiple of this: BLAS libraries sum few rows in another order, and a frame would
then depend on its batch."""
CHUNK_FRAMES = {"cpu": 256}
CHUNK_FRAMES_ELSEWHERE = 1 << 14
"""Frames that are transformed at a time: on a CPU what its second-level cache holds."""


def log_mel(
    samples: Tensor, lengths: tuple[int, ...], spec: MelSpec, *, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...]]:
    """See op.py."""
    counts = tuple(spec.frames(n) for n in lengths)
    out = samples.new_empty(sum(counts), spec.n_mels, dtype=dtype)
    if not len(out):
        return out, counts
    if spec.remove_mean and not spec.remove_dc:
        samples = _without_means(samples, lengths)
    if spec.wave_preemphasis:
        # the last sample of each clip would mix in the next clip, and is left out below
        wave = samples.double()
        samples = torch.sub(wave[1:], wave[:-1], alpha=spec.wave_preemphasis)
    starts_of_clips = accumulate((0, *lengths[:-1]))
    clips = [
        (start, length - bool(spec.wave_preemphasis), count)
        for start, length, count in zip(starts_of_clips, lengths, counts, strict=True)
        if count
    ]
    if spec.framing == "centre":
        samples, bases = _with_reflected_ends(samples, clips, spec)
    else:
        bases = [start for start, _, _ in clips]
    starts = _frame_starts(bases, [count for _, _, count in clips], spec.hop, samples.device)

    windows = samples.unfold(0, spec.win_length, 1)
    chunk = CHUNK_FRAMES.get(samples.device.type, CHUNK_FRAMES_ELSEWHERE)
    with full_float32(samples.device.type):
        for first in range(0, len(out), chunk):
            part = out[first : first + chunk]
            frames = windows.index_select(0, starts[first : first + chunk])
            part.copy_(_frames(frames, spec, dtype)[: len(part)])
    return out, counts


def _frames(frames: Tensor, spec: MelSpec, dtype: torch.dtype) -> Tensor:
    """Return the (R, n_mels) values in `dtype` of (R, win_length) pieces of a waveform.

    Up to the power spectrum in float64. The mel sums have positive terms only, so that `dtype` serves there.
    """
    scaled_window, filters = tables(spec, dtype, frames.device)
    x = frames.double()
    if spec.remove_dc:
        x = x - x.mean(1, keepdim=True)
    a = spec.frame_preemphasis
    if a:
        emphasised = torch.empty_like(x)
        torch.sub(x[:, 1:], x[:, :-1], alpha=a, out=emphasised[:, 1:])
        torch.mul(x[:, :1], 1 - a, out=emphasised[:, :1])
        x = emphasised
    spectrum = torch.fft.rfft(x * scaled_window, n=spec.n_fft)
    power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
    if spec.power != 2:
        power = power.pow_(spec.power / 2)
    mel = power.to(dtype) @ filters
    mel = mel.clamp_min_(spec.eps) if spec.log == "max" else mel.add_(spec.eps)
    return mel.log_().add_(spec.offset).div_(spec.divisor)


def _frame_starts(bases: list[int], counts: list[int], hop: int, device: torch.device) -> Tensor:
    """Return the int64 positions of the first samples of all frames, with a few zeros appended up to whole
    ROWS.

    bases: position of the first frame of each clip; counts: its frames.
    """
    total = sum(counts)
    numbers = torch.tensor([bases, counts, [0, *accumulate(counts)][:-1]]).to(device, non_blocking=True)
    offsets = numbers[0] - hop * numbers[2]
    starts = torch.repeat_interleave(offsets, numbers[1], output_size=total)
    starts += torch.arange(total, device=device) * hop
    return torch.cat([starts, starts.new_zeros(-total % ROWS)])


def _with_reflected_ends(
    samples: Tensor, clips: list[tuple[int, int, int]], spec: MelSpec
) -> tuple[Tensor, list[int]]:
    """Return the clips with reflected samples before and after each, and the position of each one's first
    frame.

    clips: (start, length, frames). A frame of n_fft samples centred on t * hop has its window in the middle,
    so only that part is laid out. Where a clip is shorter than what is reflected, the reflection goes back
    and forth.
    """
    left = spec.n_fft // 2 - (spec.n_fft - spec.win_length) // 2
    right = spec.win_length - left
    numbers = torch.tensor([clip[:2] for clip in clips]).to(samples.device, non_blocking=True)
    start, length = numbers[:, :1], numbers[:, 1:]
    before = torch.arange(-left, 0, device=samples.device)
    after = torch.arange(right, device=samples.device)
    positions = torch.cat([before.expand(len(clips), -1), length + after], dim=1)
    period = (2 * (length - 1)).clamp_min(1)
    there = positions.abs() % period
    ends = samples[start + torch.minimum(there, period - there)]

    pieces: list[Tensor] = []
    bases: list[int] = []
    base = 0
    for i, (first, size, _) in enumerate(clips):
        pieces += [ends[i, :left], samples[first : first + size], ends[i, left:]]
        bases.append(base)
        base += left + size + right
    return torch.cat(pieces), bases


def _without_means(samples: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return the packed clips less the mean of each, in float64."""
    sizes = torch.tensor(lengths).to(samples.device, non_blocking=True)
    wave = samples.double()
    means = torch.segment_reduce(wave, "mean", lengths=sizes, unsafe=True)
    return wave - torch.repeat_interleave(means, sizes, output_size=len(wave))
