# SPDX-License-Identifier: Apache-2.0
"""Patch-drop: a fifth of the tokens left out, as an augmentation of contrastive methods.

MAST and SS-MAST keep int(0.8 N) random tokens, by one permutation for the whole batch
(Sreyan88/LAPE:src/encoder/mast.py). A dropped token is a masked token of the plan: the encoder does not see it, a
contrastive objective ignores it, and an objective that rebuilds what is masked rebuilds it. An encoder that pools its
token grid needs whole columns instead, which FrameMasking(mask_ratio=0.2) drops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from masktrain.errors import ConfigError
from masktrain.masking.strategies import RandomMasking
from masktrain.masking.view import View
from masktrain.types import MaskPlan, StepKey, TokenLayout


@dataclass(frozen=True, kw_only=True)
class PatchDropMasking:
    """Tokens dropped uniformly at random, an exact count per clip.

    drop_ratio: share of dropped tokens, in (0, 1). shared_in_batch: the same tokens in all clips of the batch, as the
    code has it, which needs clips of equal length; false draws clip by clip.
    """

    name: ClassVar[str] = "patch_drop"
    needs: ClassVar[str] = "nothing"

    drop_ratio: float = 0.2
    shared_in_batch: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.drop_ratio, int | float) or not 0 < self.drop_ratio < 1:
            raise ConfigError(
                f"masking.drop_ratio: the share of dropped tokens must lie between 0 and 1, both excluded; "
                f"received {self.drop_ratio!r}. MAST has 0.2."
            )

    @property
    def mask_ratio(self) -> float:
        """Share of tokens that the encoder does not see."""
        return self.drop_ratio

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: not looked at."""
        random = RandomMasking(mask_ratio=self.drop_ratio, shared_in_batch=self.shared_in_batch)
        return random.plan(layout, key, draw)
