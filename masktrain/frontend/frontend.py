# SPDX-License-Identifier: Apache-2.0
"""From decoded audio to log-mel spectrograms, on the device that holds the samples."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from masktrain.frontend.config import FrontendConfig
from masktrain.kernels.log_mel import log_mel
from masktrain.kernels.resample import resample
from masktrain.types import AudioBatch, Spectrogram, StepKey, cumulative

CHUNK_SAMPLES = {"cpu": 1 << 18}
CHUNK_SAMPLES_ELSEWHERE = 1 << 25
"""Source samples that are taken together (a longer clip goes alone): bounds the memory of the float64
waveforms, and keeps them in a CPU's cache."""


class Frontend:
    """Resamples and transforms whole batches. It has no state beside its config."""

    def __init__(self, config: FrontendConfig) -> None:
        self.config = config

    @torch.no_grad()
    def __call__(self, batch: AudioBatch, key: StepKey | None = None) -> Spectrogram:
        """Return the spectrogram of each clip, not normalised, clips of no frame included.

        key: of a training step, which draws the jitter of the mel filters; None for evaluation.

        frames are in the dtype of the samples; the waveform between the two ops is float64, since a float32
        one moves bins far below their frame's maximum by more than 1e-3. The lengths follow from those of the
        clips (`config.frames_for`), so nothing waits for the device.
        """
        rate = self.config.sample_rate
        mel = self.config.drawn(key)
        dtype = batch.samples.dtype
        pieces = [batch.samples.new_empty(0, self.config.n_mels)]
        counts: tuple[int, ...] = ()
        first = 0
        for clips in _chunks(batch.lengths, batch.samples.device.type):
            lengths = batch.lengths[clips]
            source = batch.samples[first : first + sum(lengths)]
            first += len(source)
            wave, lengths = resample(source, lengths, batch.sample_rates[clips], rate, dtype=torch.float64)
            frames, frame_counts = log_mel(wave, lengths, mel, dtype=dtype)
            pieces.append(frames)
            counts += frame_counts
        return Spectrogram(
            frames=torch.cat(pieces),
            lengths=counts,
            cu_frames=cumulative(counts, torch.int64, batch.samples.device),
            clip_ids=batch.clip_ids.to(batch.samples.device, non_blocking=True),
        )


def _chunks(lengths: tuple[int, ...], device_type: str) -> Iterator[slice]:
    """Yield runs of clips of at most CHUNK_SAMPLES together, or of one clip."""
    limit = CHUNK_SAMPLES.get(device_type, CHUNK_SAMPLES_ELSEWHERE)
    start = size = 0
    for clip, length in enumerate(lengths):
        if clip > start and size + length > limit:
            yield slice(start, clip)
            start, size = clip, 0
        size += length
    if start < len(lengths):
        yield slice(start, len(lengths))
