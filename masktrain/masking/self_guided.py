# SPDX-License-Identifier: Apache-2.0
"""Self-guided masking: the encoder's own features say which patches belong together, and those are masked.

Bao et al., "Self-Guided Masked Autoencoder", NeurIPS 2024, and the form of it that the authors of "Rethinking masking
strategies" run (jstgermainsensortech/m2d:m2d/masking.py, object_centric_mask_with_hint). Features of all tokens, of the
encoder under training, cut the tokens of a clip in two; the scores of the cut choose the mask, and hints are exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.kernels.ncut_scores import ncut_scores
from masktrain.kernels.select_tokens import select_tokens
from masktrain.masking.hint import HintConfig, exchange
from masktrain.masking.plan import make_plan, visible_count
from masktrain.masking.strategies import RandomMasking, check_choice, check_ratio
from masktrain.masking.view import View
from masktrain.types import MaskPlan, StepKey, TokenLayout


@dataclass(frozen=True, kw_only=True)
class SelfGuidedMasking:
    """The tokens of the largest scores masked, an exact count per clip.

    mask_ratio: share of masked tokens, in (0, 1). rule: "paper" masks what is most like the foreground, "s1_code" what
    is least like either side of the cut. bipartition: how the tokens are cut in two, see `ncut_scores`. layer: the
    encoder layer of the features, counted from 1; None: the last. refresh_epochs: 0 computes scores in every step; k
    above 0 keeps them for up to k epochs of the data, so that most steps need no features. hint: how much of the mask
    is random, over the run; at hint ratio 1 the mask is that of RandomMasking and no features are computed.
    """

    name: ClassVar[str] = "self_guided"
    needs: ClassVar[str] = "features"

    mask_ratio: float = 0.75
    rule: Literal["paper", "s1_code"] = "paper"
    bipartition: Literal["ncut", "pca", "unnormalised"] = "ncut"
    layer: int | None = None
    refresh_epochs: int = 0
    hint: HintConfig = field(default_factory=HintConfig)

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)
        check_choice("rule", self.rule, ("paper", "s1_code"))
        check_choice("bipartition", self.bipartition, ("ncut", "pca", "unnormalised"))
        if self.layer is not None and (type(self.layer) is not int or self.layer < 1):
            raise ConfigError(
                f"masking.layer: encoder layers are counted from 1, none is the last; received {self.layer!r}."
            )
        if type(self.refresh_epochs) is not int or self.refresh_epochs < 0:
            raise ConfigError(
                f"masking.refresh_epochs: a whole number of epochs, 0 for scores of every step; received "
                f"{self.refresh_epochs!r}."
            )

    def scores(self, layout: TokenLayout, view: View) -> Tensor:
        """Return (N,) float32 in [0, 1], the larger the sooner masked, from the features of the view."""
        return ncut_scores(
            view.features(self.layer),
            layout.cu_tokens,
            layout.lengths,
            rule=self.rule,
            bipartition=self.bipartition,
        )

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch. The draws of a step differ by their hints alone: without hints they are one mask.

        view: how far the run is, and scores that are there already, or features to compute them from.
        """
        if view is None:
            raise ValueError("SelfGuidedMasking.plan: needs a view of the batch, received None.")
        ratio = self.hint.ratio(view.progress)
        if ratio >= 1:
            return RandomMasking(mask_ratio=self.mask_ratio).plan(layout, key, draw)
        stored = view.stored_scores()
        n_visible = tuple(visible_count(n, self.mask_ratio) for n in layout.lengths)
        visible, masked = select_tokens(
            layout.cu_tokens,
            layout.lengths,
            n_visible,
            key.counter,
            layout.clip_ids,
            scores=self.scores(layout, view) if stored is None else stored,
            sample=False,
            stream=draw,
        )
        return exchange(layout, key, draw, make_plan(layout, visible, masked, n_visible), ratio)
