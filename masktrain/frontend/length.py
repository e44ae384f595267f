# SPDX-License-Identifier: Apache-2.0
"""Length policies: waveforms filled with silence; spectrograms cropped, cropped to the shortest, padded with zeros.

A random crop of a clip depends on (seed, step, clip id) and its number of frames alone: word 0 of the clip's
FRAME_CROP stream, scaled to the number of positions.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from masktrain.kernels.philox import Purpose, philox_words
from masktrain.types import AudioBatch, Spectrogram, StepKey, cumulative


def crop_to(spectrogram: Spectrogram, frames: int, key: StepKey | None) -> Spectrogram:
    """Return clips of at most `frames` frames; shorter ones stay as they are.

    With a key the crop starts at (word * (n - frames + 1)) >> 32, every position equally likely (as M2D and
    MAE-AST crop); without one it is the first frames (as AST, SSAST and AudioMAE cut).
    """
    lengths = tuple(min(n, frames) for n in spectrogram.lengths)
    if lengths == spectrogram.lengths:
        return spectrogram
    device = spectrogram.frames.device
    starts = spectrogram.cu_frames[:-1]
    if key is not None:
        positions = torch.tensor([max(1, n - frames + 1) for n in spectrogram.lengths])
        words = philox_words(key.counter, spectrogram.clip_ids, 1, purpose=Purpose.FRAME_CROP)[:, 0]
        starts = starts + ((words * positions.to(device, non_blocking=True)) >> 32)
    cu_frames = cumulative(lengths, torch.int64, device)
    return Spectrogram(
        frames=spectrogram.frames.index_select(0, _runs(starts, cu_frames, lengths)),
        lengths=lengths,
        cu_frames=cu_frames,
        clip_ids=spectrogram.clip_ids,
    )


def crop_to_shortest(spectrogram: Spectrogram, key: StepKey | None) -> Spectrogram:
    """Return the clips cropped to the shortest of them
    (AlanBaade/MAE-AST-Public:mae_ast/data/mae_ast_dataset.py)."""
    return crop_to(spectrogram, min(spectrogram.lengths, default=0), key)


def pad_to(spectrogram: Spectrogram, frames: int, key: StepKey | None = None) -> Spectrogram:
    """Return clips of exactly `frames` frames: longer ones cropped as by `crop_to`, shorter ones filled with
    zeros.

    The zeros are log-mel values, as YuanGongND/ast:src/dataloader.py and nttcslab/m2d:audio_dataset.py have
    them: after normalisation they are neither 0 nor silence.
    """
    cropped = crop_to(spectrogram, frames, key)
    clips = len(cropped.lengths)
    cu_frames = cumulative((frames,) * clips, torch.int64, cropped.frames.device)
    padded = cropped.frames.new_zeros(clips * frames, cropped.frames.shape[1])
    padded.index_copy_(0, _runs(cu_frames[:-1], cropped.cu_frames, cropped.lengths), cropped.frames)
    return Spectrogram(
        frames=padded, lengths=(frames,) * clips, cu_frames=cu_frames, clip_ids=cropped.clip_ids
    )


def fill_with_silence(audio: AudioBatch, seconds: float) -> AudioBatch:
    """Return clips of at least `seconds`, shorter ones filled with zero samples at their ends
    (WangHelin1997/MaskSpec:audioset/dataset.py)."""
    wanted = (round(seconds * rate) for rate in audio.sample_rates)
    lengths = tuple(max(n, w) for n, w in zip(audio.lengths, wanted, strict=True))
    if lengths == audio.lengths:
        return audio
    device = audio.samples.device
    cu = cumulative(lengths, torch.int64, device)
    clips = cumulative(audio.lengths, torch.int64, device)
    filled = audio.samples.new_zeros(sum(lengths))
    filled.index_copy_(0, _runs(cu[:-1], clips, audio.lengths), audio.samples)
    return replace(audio, samples=filled, lengths=lengths)


def _runs(starts: Tensor, cu: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return starts[b] ... starts[b] + lengths[b] - 1 for each clip, one after another: (sum of lengths,)
    int64.

    starts: (B,) int64. cu: (B+1,) int64, the cumulative lengths on the same device.
    """
    total = sum(lengths)
    counts = torch.tensor(lengths, dtype=torch.int64).to(cu.device, non_blocking=True)
    offsets = torch.repeat_interleave(starts - cu[:-1], counts, output_size=total)
    return offsets + torch.arange(total, device=cu.device)
