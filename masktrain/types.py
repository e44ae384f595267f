# SPDX-License-Identifier: Apache-2.0
"""What travels between the parts: packed audio, packed spectrograms, tokens, mask plans, the key of randomness.

Shapes: B clips, S samples, T frames, F mel bins, N tokens, V visible tokens, M masked tokens, P values of a patch,
D width. Everything of different length travels packed: a flat tensor and the cumulative lengths of its clips
(`cu_*`, first 0, last the total). Lengths are also on the host, since they follow from the clip lengths: nothing
has to wait for the device to know a size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

Order = Literal["time", "freq"]


def cumulative(lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Return (B+1,) cumulative lengths on `device`, copied without waiting for the device."""
    cu = torch.tensor([0, *accumulate(lengths)], dtype=dtype)
    return cu.to(device, non_blocking=True)


@dataclass(frozen=True)
class AudioBatch:
    """Mono clips as the loader decoded them, each at its file's own sample rate.

    samples: (S,) float32 in [-1, 1], packed. lengths: samples of each clip. sample_rates: Hz. clip_ids: (B,) int64,
    the row of the manifest. starts: (B,) int64, first source sample of the crop.
    """

    samples: Tensor
    lengths: tuple[int, ...]
    sample_rates: tuple[int, ...]
    clip_ids: Tensor
    starts: Tensor


@dataclass(frozen=True)
class Spectrogram:
    """Packed log-mel frames. frames: (T, F) float32, natural log, not normalised. lengths: frames of each clip.
    cu_frames: (B+1,) int64 on the device of `frames`. clip_ids: (B,) int64 on that device."""

    frames: Tensor
    lengths: tuple[int, ...]
    cu_frames: Tensor
    clip_ids: Tensor

    def clip(self, index: int) -> Tensor:
        """Return the (T_i, F) frames of one clip."""
        start = sum(self.lengths[:index])
        return self.frames[start : start + self.lengths[index]]


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """How a spectrogram is cut into tokens. Patches do not overlap.

    Token t of a clip with n_t columns: order "time" is time outer, frequency inner (t = column * freq + row);
    order "freq" is frequency outer (t = row * n_t + column). The values of a patch are flattened with the same
    axis outer. A column that the clip ends inside exists if at least half its frames lie in the clip
    (`partial="half"`; frames past the end are 0 after normalisation) or not at all (`partial="drop"`).
    """

    freq: int
    patch_freq: int
    patch_time: int
    order: Order
    partial: Literal["half", "drop"] = "half"

    @property
    def patch_values(self) -> int:
        """Values of one patch."""
        return self.patch_freq * self.patch_time

    def columns(self, frames: int) -> int:
        """Patches along time of a clip of `frames` frames."""
        full, rest = divmod(frames, self.patch_time)
        return full + (1 if self.partial == "half" and rest and 2 * rest >= self.patch_time else 0)

    def tokens(self, frames: int) -> int:
        """Tokens of a clip of `frames` frames."""
        return self.freq * self.columns(frames)

    def layout(self, spectrogram: Spectrogram) -> TokenLayout:
        """Return the tokens of a batch."""
        columns = tuple(self.columns(n) for n in spectrogram.lengths)
        lengths = tuple(self.freq * c for c in columns)
        device = spectrogram.frames.device
        return TokenLayout(
            grid=self,
            columns=columns,
            lengths=lengths,
            cu_tokens=cumulative(lengths, torch.int32, device),
            cu_frames=spectrogram.cu_frames,
            clip_ids=spectrogram.clip_ids,
        )


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a packed batch. columns, lengths: patches along time and tokens of each clip, on the host.
    cu_tokens: (B+1,) int32. cu_frames: (B+1,) int64. clip_ids: (B,) int64. Token ids count through the batch:
    token t of clip b is cu_tokens[b] + t."""

    grid: TokenGrid
    columns: tuple[int, ...]
    lengths: tuple[int, ...]
    cu_tokens: Tensor
    cu_frames: Tensor
    clip_ids: Tensor


@dataclass(frozen=True)
class MaskPlan:
    """Which tokens are visible and which are masked.

    visible: (V,) int32, masked: (M,) int32: ids that count through the batch, ascending, disjoint, together all
    tokens. cu_visible, cu_masked: (B+1,) int32. n_visible, n_masked: the counts of each clip on the host.
    """

    layout: TokenLayout
    visible: Tensor
    masked: Tensor
    n_visible: tuple[int, ...]
    n_masked: tuple[int, ...]
    cu_visible: Tensor
    cu_masked: Tensor


@dataclass(frozen=True)
class StepKey:
    """The key of all randomness of one step.

    counter: (2,) int64 [seed, step] on the device, what ops take. seed, step: the same on the host, for the few
    choices made there (layerdrop). seed lies in [0, 2^48), step in [0, 2^32).
    """

    counter: Tensor
    seed: int
    step: int

    @staticmethod
    def make(seed: int, step: int, device: torch.device | str) -> StepKey:
        """Return the key of `step`."""
        return StepKey(
            torch.tensor([seed, step], dtype=torch.int64).to(device, non_blocking=True), seed, step
        )


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss: the sum over its elements and their number (known before the forward pass), so that
    ranks and micro-batches add up to the mean of the whole batch. weight: its factor in the total loss."""

    sum: Tensor
    count: int
    weight: float
