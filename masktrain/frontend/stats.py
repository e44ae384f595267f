# SPDX-License-Identifier: Apache-2.0
"""Mean and standard deviation of log-mel values, over everything and per mel bin, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from masktrain.errors import DataError
from masktrain.types import Spectrogram

STD_FLOOR = 0.1
"""A bin below this hardly varies (silence, or a low-passed corpus); dividing by it would blow up other
audio."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Population statistics of the frames seen. frames: their number. Values in natural-log units."""

    frames: int
    dataset_mean: float
    dataset_std: float
    bin_mean: tuple[float, ...]
    bin_std: tuple[float, ...]

    @property
    def flat_bins(self) -> tuple[int, ...]:
        """Mel bins whose standard deviation lies under STD_FLOOR."""
        return tuple(i for i, std in enumerate(self.bin_std) if std < STD_FLOOR)

    def warning(self) -> str | None:
        """Return what to know before normalising with these, or None."""
        if self.dataset_std < STD_FLOOR:
            return (
                f"dataset_std is {self.dataset_std:.3g}, under {STD_FLOOR}: the audio is silent or constant. "
                f"Check the files before training on them."
            )
        flat = self.flat_bins
        if not flat:
            return None
        shown = ", ".join(str(i) for i in flat[:8]) + (", ..." if len(flat) > 8 else "")
        return (
            f"{len(flat)} of {len(self.bin_std)} mel bins have a standard deviation under {STD_FLOOR} "
            f"(bins {shown}): silence, an empty filter or a low-passed corpus. Statistics per bin would "
            f"amplify other audio there; use the global ones or floor them at {STD_FLOOR}."
        )


class RunningStats:
    """Float64 sums over the frames of batches. They stay on the device until `result`; sums of several ranks
    add up.

    Log-mel values lie within some tens and vary by more than 1e-3, so that float64 sums of squares keep at
    least six digits of the variance over 1e9 frames.
    """

    def __init__(self, n_mels: int, device: torch.device | str = "cpu") -> None:
        self.frames = 0
        self.sums: Tensor = torch.zeros(2, n_mels, dtype=torch.float64, device=device)

    def update(self, spectrogram: Spectrogram) -> None:
        """Add all frames of a batch."""
        values = spectrogram.frames.double()
        self.frames += len(values)
        self.sums[0] += values.sum(0)
        self.sums[1] += values.square().sum(0)

    def merge(self, other: RunningStats) -> None:
        """Add what another has seen."""
        self.frames += other.frames
        self.sums += other.sums.to(self.sums.device)

    def result(self) -> Statistics:
        """Return the statistics of all frames so far."""
        if not self.frames:
            raise DataError(
                "statistics: no frames were seen; every clip is shorter than one frame or the manifest is "
                "empty. Name audio of at least 0.1 s."
            )
        mean, square = self.sums.cpu() / self.frames
        std = (square - mean.square()).clamp_min(0).sqrt()
        total_mean = mean.mean()
        total_std = (square.mean() - total_mean.square()).clamp_min(0).sqrt()
        return Statistics(
            frames=self.frames,
            dataset_mean=total_mean.item(),
            dataset_std=total_std.item(),
            bin_mean=tuple(mean.tolist()),
            bin_std=tuple(std.tolist()),
        )
