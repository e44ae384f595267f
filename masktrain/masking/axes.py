# SPDX-License-Identifier: Apache-2.0
"""Masks along one axis: whole stretches of time, or whole bands of frequency, as AudioMosaic's two views have them.

Its paper and its code differ (HanxunH/AudioMosaic:models/audiomosaic.py). The paper removes columns from one view and
rows from the other. The code does so on the token sequence reshaped to a grid of R x C, R being the rows and C the
columns of the real grid of C x R: what it calls a time step is C tokens in a row of the time-major order, that is C / R
whole columns, and what it calls a frequency is the tokens whose number leaves the same rest modulo C, a pattern of
C / R columns that repeats R times. Both readings are offered; on a clip of any length the code's is that arithmetic,
so that where C / R is no whole number, a stretch begins or ends inside a column. A third reading, "both", in which each
view gets both masks, is TimeFrequencyMasking with mask_t_prob 0.6 and mask_f_prob 0.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.kernels.select_tokens import select_tokens
from masktrain.masking.plan import cumulative_counts, visible_count
from masktrain.masking.strategies import (
    FrameMasking,
    check_choice,
    check_ratio,
    mask_units,
    plan_of_hidden,
    token_places,
)
from masktrain.masking.view import View
from masktrain.types import MaskPlan, StepKey, TokenLayout

READINGS = ("paper", "code")


def _number(layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clip of each token, its number in the time-major order of its clip, and the columns of its clip, each
    (N,), whatever the order of the grid."""
    clip, column, row = token_places(layout)
    columns = (layout.cu_tokens[clip + 1] - layout.cu_tokens[clip]) // layout.grid.freq
    return clip, column * layout.grid.freq + row, columns


@dataclass(frozen=True, kw_only=True)
class TimeMasking:
    """Stretches of time masked, with all their frequencies; the defaults are the paper's.

    mask_ratio: share of masked units, in (0, 1): of n units max(1, int(n (1 - mask_ratio))) are kept. reading: "paper":
    a unit is a column, and the mask that of FrameMasking; "code": of a clip of C columns and R rows a unit is one of R
    stretches of C tokens each, C / R columns (64 x 8 tokens at 0.6: 192 are kept). contiguous: the masked columns lie
    together in one stretch, every place that leaves the count being equally likely; with reading "paper" only.
    """

    name: ClassVar[str] = "time"
    needs: ClassVar[str] = "nothing"

    mask_ratio: float = 0.6
    reading: Literal["paper", "code"] = "paper"
    contiguous: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)
        check_choice("reading", self.reading, READINGS)
        if self.contiguous and self.reading == "code":
            raise ConfigError(
                "masking.contiguous: the code masks stretches of its own; received contiguous=true with reading "
                "code. Leave it out, or set masking.reading=paper."
            )

    def units(self, layout: TokenLayout) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Return how many units each clip has, and the clip and the unit of each token, both (N,)."""
        if self.reading == "paper":
            clip, column, _ = token_places(layout)
            return layout.columns, clip, column
        clip, number, columns = _number(layout)
        return (layout.grid.freq,) * len(layout.columns), clip, number // columns

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: not looked at."""
        if self.contiguous:
            return self._one_stretch(layout, key, draw)
        if self.reading == "paper":
            return FrameMasking(mask_ratio=self.mask_ratio).plan(layout, key, draw)
        n_units, clip, unit = self.units(layout)
        kept = tuple(visible_count(n, self.mask_ratio) for n in n_units)
        return mask_units(layout, key, n_units, clip, unit, layout.columns, kept, draw)

    def _one_stretch(self, layout: TokenLayout, key: StepKey, draw: int) -> MaskPlan:
        """Return the plan whose masked columns lie together."""
        kept = tuple(visible_count(c, self.mask_ratio) for c in layout.columns)
        # With k columns kept the stretch has k + 1 places, of which one is chosen as `visible`.
        places = tuple(k + 1 for k in kept)
        cu_places = cumulative_counts(places, layout.cu_tokens.device)
        chosen, _ = select_tokens(
            cu_places, places, (1,) * len(places), key.counter, layout.clip_ids, stream=draw
        )
        start = chosen - cu_places[:-1]
        masked = (layout.cu_tokens.diff() // layout.grid.freq) - (cu_places.diff() - 1)
        clip, column, _ = token_places(layout)
        hidden = (column >= start[clip]) & (column < (start + masked)[clip])
        n_visible = tuple(k * layout.grid.freq for k in kept)
        return plan_of_hidden(layout, key, hidden.to(torch.uint8), n_visible, draw)


@dataclass(frozen=True, kw_only=True)
class FrequencyMasking:
    """Bands of frequency masked, over the whole clip; the defaults are the paper's.

    mask_ratio: share of masked units, in (0, 1): of n units max(1, int(n (1 - mask_ratio))) are kept. reading: "paper":
    a unit is a row of the grid; "code": of a clip of C columns and R rows a unit is one of C sets of R tokens, each C
    tokens from the last in the time-major order (64 x 8 tokens at 0.4: 304 are kept). That is no band.
    """

    name: ClassVar[str] = "frequency"
    needs: ClassVar[str] = "nothing"

    mask_ratio: float = 0.4
    reading: Literal["paper", "code"] = "paper"

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)
        check_choice("reading", self.reading, READINGS)

    def units(self, layout: TokenLayout) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Return how many units each clip has, and the clip and the unit of each token, both (N,)."""
        if self.reading == "paper":
            clip, _, row = token_places(layout)
            return (layout.grid.freq,) * len(layout.columns), clip, row
        clip, number, columns = _number(layout)
        return layout.columns, clip, number % columns

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: not looked at."""
        n_units, clip, unit = self.units(layout)
        kept = tuple(visible_count(n, self.mask_ratio) for n in n_units)
        rows = (layout.grid.freq,) * len(layout.columns)
        return mask_units(
            layout, key, n_units, clip, unit, layout.columns if self.reading == "paper" else rows, kept, draw
        )
