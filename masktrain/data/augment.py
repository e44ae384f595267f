# SPDX-License-Identifier: Apache-2.0
"""Augmentation of decoded waveforms, before they are resampled, in packed batches on their device.

"roll_mag_aug" of facebookresearch/AudioMAE:dataset.py (AudioMAE, EAT and AudioMosaic): the waveform is rolled around by
a uniform number of samples and multiplied by 0.5 + Beta(10, 10). There it is already at the front end's rate; a roll in
samples of the file is the same up to the edge that the resampling filter smooths where end and start now meet.

What a clip gets depends on (seed, step, clip id) and its number of samples alone: word 0 of its AUGMENT stream, scaled
to the number of samples, is the roll; the 10th smallest of words 1 to 19 is the gain, since that order statistic of 19
uniform variates is distributed as Beta(10, 10). The integers are the same everywhere, the product to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from masktrain.kernels.philox import Purpose, philox_words
from masktrain.types import AudioBatch, StepKey, cumulative

LEAST_GAIN = 0.5
UNIFORMS, RANK = 19, 10  # Beta(RANK, UNIFORMS + 1 - RANK)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What is done to the waveforms of training clips; held-out clips stay as they are."""

    roll: bool = False
    """Roll each clip around by a random number of samples."""
    gain: bool = False
    """Multiply each clip by 0.5 + Beta(10, 10): 0.5 to 1.5."""

    def describe(self) -> str:
        """Return the line of the start block, "" where nothing is done."""
        parts = (("roll", self.roll), (f"gain {LEAST_GAIN} + Beta({RANK}, {UNIFORMS + 1 - RANK})", self.gain))
        return " and ".join(name for name, on in parts if on)


def augment(audio: AudioBatch, config: AugmentConfig, key: StepKey) -> AudioBatch:
    """Return the batch with its samples augmented. Key, clip ids and samples are on one device, which nothing waits
    for."""
    if not (config.roll or config.gain):
        return audio
    words = philox_words(key.counter, audio.clip_ids, 1 + UNIFORMS, purpose=Purpose.AUGMENT)
    samples, device = audio.samples, audio.samples.device
    sizes = torch.tensor(audio.lengths, dtype=torch.int64).to(device, non_blocking=True)
    if config.roll:
        samples = _rolled(samples, audio.lengths, sizes, (words[:, 0] * sizes) >> 32)
    if config.gain:
        beta = words[:, 1:].sort(dim=1).values[:, RANK - 1].double() * 2.0**-32
        gain = (LEAST_GAIN + beta).to(samples.dtype)
        samples = samples * torch.repeat_interleave(gain, sizes, output_size=len(samples))
    return replace(audio, samples=samples)


def _rolled(samples: Tensor, lengths: tuple[int, ...], sizes: Tensor, shift: Tensor) -> Tensor:
    """Return sample (p - shift) mod n of each clip of n samples at its place p."""
    # positions take as much memory as the samples, and twice that only where they have to
    kind = torch.int32 if len(samples) < 1 << 31 else torch.int64

    def each(values: Tensor) -> Tensor:
        return torch.repeat_interleave(values.to(kind), sizes, output_size=len(samples))

    starts = cumulative(lengths, kind, samples.device)[:-1]
    source = torch.arange(len(samples), dtype=kind, device=samples.device).sub_(each(shift))
    source += (source < each(starts)) * each(sizes)
    return samples.index_select(0, source)
