# SPDX-License-Identifier: Apache-2.0
"""From decoded audio to log-mel spectrograms, on the device that holds the samples."""

from __future__ import annotations

import torch

from masktrain.frontend.config import FrontendConfig
from masktrain.kernels.log_mel import log_mel
from masktrain.kernels.resample import resample
from masktrain.types import AudioBatch, Spectrogram, cumulative


class Frontend:
    """Resamples and transforms whole batches. It has no state beside its config."""

    def __init__(self, config: FrontendConfig) -> None:
        self.config = config

    @torch.no_grad()
    def __call__(self, batch: AudioBatch) -> Spectrogram:
        """Return the spectrogram of each clip, not normalised, clips of no frame included.

        The lengths follow from those of the clips (`config.frames_for`), so nothing waits for the device.
        """
        config = self.config
        samples, lengths = resample(batch.samples, batch.lengths, batch.sample_rates, config.sample_rate)
        frames, counts = log_mel(samples, lengths, config.mel)
        device = frames.device
        return Spectrogram(
            frames=frames,
            lengths=counts,
            cu_frames=cumulative(counts, torch.int64, device),
            clip_ids=batch.clip_ids.to(device, non_blocking=True),
        )
