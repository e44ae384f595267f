# SPDX-License-Identifier: Apache-2.0
"""Masks along time and frequency: whole columns and whole rows of the token grid together.

facebookresearch/AudioMAE:models_mae.py, random_masking_2d, which knows a grid of 64 columns x 8 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from masktrain.errors import ConfigError
from masktrain.kernels.select_tokens import select_tokens
from masktrain.masking.plan import cumulative_counts, visible_count
from masktrain.masking.strategies import plan_of_hidden, token_places
from masktrain.masking.view import View
from masktrain.types import MaskPlan, StepKey, TokenLayout


@dataclass(frozen=True, kw_only=True)
class TimeFrequencyMasking:
    """Whole columns and whole rows masked: a token is visible where its column and its row are.

    mask_t_prob: share of masked columns, mask_f_prob: of masked rows, both in [0, 1), not both 0; the defaults are
    the code's. Of c columns max(1, int(c (1 - mask_t_prob))) are kept, and of the rows likewise, drawn clip by clip.
    """

    name: ClassVar[str] = "time_frequency"
    needs: ClassVar[str] = "nothing"

    mask_t_prob: float = 0.6
    mask_f_prob: float = 0.5

    def __post_init__(self) -> None:
        for field in ("mask_t_prob", "mask_f_prob"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(
                    f"masking.{field}: a share of masked tokens lies between 0 and 1, 1 excluded; received "
                    f"{value!r}. AudioMAE has mask_t_prob 0.6 and mask_f_prob 0.5."
                )
        if not self.mask_t_prob and not self.mask_f_prob:
            raise ConfigError(
                "masking: mask_t_prob and mask_f_prob are both 0, so that nothing would be masked; received 0 and 0. "
                "Set one of them above 0."
            )

    @property
    def mask_ratio(self) -> float:
        """Share of masked tokens, before the counts are cut to whole columns and rows."""
        return 1 - (1 - self.mask_t_prob) * (1 - self.mask_f_prob)

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: not looked at."""
        grid, cu_tokens = layout.grid, layout.cu_tokens
        clips, device = len(layout.columns), cu_tokens.device
        kept_columns = tuple(visible_count(c, self.mask_t_prob) for c in layout.columns)
        kept_rows = visible_count(grid.freq, self.mask_f_prob)
        cu_columns = cumulative_counts(layout.columns, device)
        column_hidden = self._hidden(cu_columns, layout.columns, kept_columns, layout, key, 2 * draw)
        cu_rows = torch.arange(clips + 1, dtype=torch.int32, device=device) * grid.freq
        row_hidden = self._hidden(
            cu_rows, (grid.freq,) * clips, (kept_rows,) * clips, layout, key, 2 * draw + 1
        )

        clip, column, row = token_places(layout)
        hidden = column_hidden[cu_columns[clip] + column] | row_hidden[clip * grid.freq + row]
        n_visible = tuple(kept_rows * c for c in kept_columns)
        return plan_of_hidden(layout, key, hidden, n_visible, 2 * draw)

    def _hidden(
        self,
        cu: torch.Tensor,
        counts: tuple[int, ...],
        kept: tuple[int, ...],
        layout: TokenLayout,
        key: StepKey,
        stream: int,
    ) -> torch.Tensor:
        """Return uint8, 1 for the columns or rows of the batch that are drawn to be masked."""
        _, hidden = select_tokens(cu, counts, kept, key.counter, layout.clip_ids, stream=stream)
        marks = torch.zeros(sum(counts), dtype=torch.uint8, device=cu.device)
        marks[hidden] = 1
        return marks
