# SPDX-License-Identifier: Apache-2.0
"""Inverse block masking: square blocks stay visible, everything else is masked.

cwx-worst-one/EAT:utils/data_utils.py, compute_block_mask_2d, after data2vec 2.0 (facebookresearch/fairseq:
fairseq/data/data_utils.py). The number of blocks is fixed, so that they rarely cover the exact count of tokens: covered
ones too many are masked, missing ones are made visible one by one, both uniformly. On a grid of 5 x 38 at ratio 0.7 two
blocks cover 35 of the 57 visible tokens on average; the others are scattered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from masktrain.errors import ConfigError
from masktrain.kernels.block_marks import block_marks
from masktrain.masking.hint import check_epochs, epoch_of
from masktrain.masking.plan import visible_count
from masktrain.masking.strategies import RandomMasking, check_ratio, plan_of_hidden
from masktrain.masking.view import View
from masktrain.types import MaskPlan, StepKey, TokenLayout


@dataclass(frozen=True, kw_only=True)
class InverseBlockMasking:
    """Blocks of visible tokens, an exact count per clip; the defaults are EAT's.

    mask_ratio: share of masked tokens, in (0, 1). side: of a block, in tokens. adjust: added to the visible share when
    blocks are counted, at least 0: a clip of n tokens gets int(n (1 - mask_ratio + adjust) / side^2) blocks, whose
    centres are drawn with replacement and whose cells are moved into the grid where they lie outside. start_epoch:
    epochs of plain random masks at the start, of `epochs` (jstgermainsensortech/m2d has 50 of 300, EAT 0); a run of
    another length has as many equal parts.
    """

    name: ClassVar[str] = "inverse_block"

    mask_ratio: float = 0.8
    side: int = 5
    adjust: float = 0.07
    start_epoch: int = 0
    epochs: int = 300

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)
        if type(self.side) is not int or self.side < 1:
            raise ConfigError(
                f"masking.side: a whole number of tokens, at least 1; received {self.side!r}. EAT has 5."
            )
        if not isinstance(self.adjust, int | float) or not 0 <= self.adjust < 1:
            raise ConfigError(
                f"masking.adjust: a share of the tokens from 0 on, below 1; received {self.adjust!r}. EAT has 0.07."
            )
        check_epochs("masking.", self.start_epoch, self.epochs)

    @property
    def needs(self) -> str:
        """What the strategy looks at: how far the run is, if it begins with random masks."""
        return "progress" if self.start_epoch else "nothing"

    def blocks(self, n: int) -> int:
        """Return how many blocks a clip of `n` tokens gets, in the double precision of the code."""
        return int(n * ((1 - self.mask_ratio + self.adjust) / self.side**2))

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: how far the run is; not looked at
        without a start epoch."""
        if self.start_epoch:
            if view is None:
                raise ValueError(
                    "InverseBlockMasking.plan: a start epoch needs a view of the run, received None."
                )
            if epoch_of(view.progress, self.epochs) < self.start_epoch:
                return RandomMasking(mask_ratio=self.mask_ratio).plan(layout, key, draw)
        marks = block_marks(
            layout.cu_tokens,
            layout.lengths,
            None,
            key.counter,
            layout.clip_ids,
            freq=layout.grid.freq,
            order=layout.grid.order,
            sides=(self.side,),
            growth="clamped",
            blocks=tuple(self.blocks(n) for n in layout.lengths),
            stream=draw,
        )
        n_visible = tuple(visible_count(n, self.mask_ratio) for n in layout.lengths)
        return plan_of_hidden(layout, key, 1 - marks, n_visible, draw)
