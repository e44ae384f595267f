# SPDX-License-Identifier: Apache-2.0
"""Dispersion-weighted masking: patches with more spread in them are masked more often.

The weight of a patch is the mean absolute deviation of its normalised values, or their variance; masked tokens are
sampled without replacement in proportion to it, and hints are exchanged (jstgermainsensortech/m2d:m2d/masking.py,
random_weighted_mask_with_hint). A constant patch, silence or padding, has the least weight there is and stays visible
until the hint exchange takes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from masktrain.kernels.mask_gather import mask_gather
from masktrain.kernels.patch_mad import patch_mad
from masktrain.kernels.select_tokens import select_tokens
from masktrain.masking.hint import HintConfig, exchange
from masktrain.masking.plan import make_plan, visible_count
from masktrain.masking.strategies import RandomMasking, check_choice, check_ratio
from masktrain.masking.view import View
from masktrain.types import MaskPlan, StepKey, TokenLayout


@dataclass(frozen=True, kw_only=True)
class DispersionMasking:
    """Tokens masked with probability in proportion to the spread of their patch, an exact count per clip.

    mask_ratio: share of masked tokens, in (0, 1). weight: "mad", the mean absolute deviation, or "variance", the
    unbiased one. deterministic: the patches of the largest weights are masked, nothing is drawn but the hints. hint: how
    much of the mask is random, over the run; at hint ratio 1 the mask is that of RandomMasking and the spectrogram is
    not looked at.
    """

    name: ClassVar[str] = "dispersion"
    needs: ClassVar[str] = "spectrogram"

    mask_ratio: float = 0.75
    weight: Literal["mad", "variance"] = "mad"
    deterministic: bool = False
    hint: HintConfig = field(default_factory=lambda: HintConfig(start_epoch=0))

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)
        check_choice("weight", self.weight, ("mad", "variance"))

    def scores(self, layout: TokenLayout, view: View) -> Tensor:
        """Return (N,) float32, at least 0: the weight of each token."""
        grid, frames = layout.grid, view.spectrogram.frames
        if self.weight == "mad":
            return patch_mad(
                frames,
                layout.cu_frames,
                layout.cu_tokens,
                layout.lengths,
                mean=view.mean,
                scale=view.scale,
                freq=grid.freq,
                patch_freq=grid.patch_freq,
                patch_time=grid.patch_time,
                order=grid.order,
            )
        values = mask_gather(
            frames,
            layout.cu_frames,
            layout.cu_tokens,
            torch.arange(sum(layout.lengths), dtype=torch.int32, device=frames.device),
            mean=view.mean,
            scale=view.scale,
            freq=grid.freq,
            patch_freq=grid.patch_freq,
            patch_time=grid.patch_time,
            order=grid.order,
        )
        away = values.float()
        away = away - away.mean(1, keepdim=True)
        # A patch of one value has no spread.
        return away.square().sum(1) / max(1, grid.patch_values - 1)

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: how far the run is, the spectrogram
        and its input norm."""
        if view is None:
            raise ValueError("DispersionMasking.plan: needs a view of the batch, received None.")
        ratio = self.hint.ratio(view.progress)
        if ratio >= 1:
            return RandomMasking(mask_ratio=self.mask_ratio).plan(layout, key, draw)
        n_visible = tuple(visible_count(n, self.mask_ratio) for n in layout.lengths)
        visible, masked = select_tokens(
            layout.cu_tokens,
            layout.lengths,
            n_visible,
            key.counter,
            layout.clip_ids,
            scores=self.scores(layout, view),
            sample=not self.deterministic,
            stream=draw,
        )
        return exchange(layout, key, draw, make_plan(layout, visible, masked, n_visible), ratio)
