# SPDX-License-Identifier: Apache-2.0
"""What a training step shows a masking strategy of a micro-batch: progress, spectrogram, features, scores.

Features come from one pass of the encoder over all tokens, without gradient and without dropout, in the number format
of the step. They draw nothing, so that a step's randomness is the same with them and without. Nothing is computed
before a strategy asks, and nothing twice: all masks that a step draws of a clip come from one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from masktrain.masking.plan import unmasked
from masktrain.masking.registry import Strategy
from masktrain.masking.strategies import RandomMasking
from masktrain.masking.view import View
from masktrain.models.flops import stack_flops
from masktrain.models.pretrainer import Pretrainer
from masktrain.types import Spectrogram, TokenLayout, cumulative

if TYPE_CHECKING:
    from masktrain.training.score_cache import Lookup, ScoreCache

Scores = Callable[[TokenLayout, View], Tensor]


@dataclass
class Done:
    """What a view has computed so far. flops: of its feature passes. features: {layer: (N, D)}."""

    flops: int = 0
    features: dict[int, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None


@dataclass(frozen=True)
class StepView(View):
    """See the module. layout: the tokens of the spectrogram. model: without what distributes it, since a feature pass
    is a matter of one rank. autocast: makes the context of the step's number format. scores: what turns features into
    scores, for a strategy that needs features. cache, lookup: where scores are kept, and where those of these clips
    are."""

    layout: TokenLayout
    model: Pretrainer
    autocast: Callable[[], AbstractContextManager[None]]
    scores: Scores | None = None
    cache: ScoreCache | None = None
    lookup: Lookup | None = None
    done: Done = field(default_factory=Done)

    def features(self, layer: int | None) -> Tensor:
        """See View."""
        config = self.model.encoder.config
        layer = config.layers if layer is None else layer
        if layer not in self.done.features:
            with torch.no_grad(), self.autocast():
                plan = unmasked(self.layout)
                found = self.model.encoded(self.spectrogram, plan, self.mean, self.scale, (layer,))[layer]
            self.done.features[layer] = found.tokens
            rows = [n + found.leading.shape[1] for n in self.layout.lengths]
            embed = 2 * sum(self.layout.lengths) * self.layout.grid.patch_values * config.width
            self.done.flops += embed + stack_flops(rows, config.width, config.ffn_width, layer)
        return self.done.features[layer]

    def stored_scores(self) -> Tensor | None:
        """See View: here the scores of this view, computed at the first call, or taken out of the cache."""
        if self.scores is None:
            return None
        if self.done.scores is None:
            if self.cache is None or self.lookup is None:
                self.done.scores = self.scores(self.layout, self)
            else:
                self.done.scores = self.cache.scores(self.lookup, self.layout, self._fresh)
        return self.done.scores

    def _fresh(self, clips: Sequence[int]) -> tuple[TokenLayout, Tensor]:
        """Return the layout and the (K,) scores of some clips of the batch, computed now."""
        assert self.scores is not None
        if len(clips) == len(self.layout.lengths):
            return self.layout, self.scores(self.layout, self)
        spectrogram = clips_of(self.spectrogram, clips)
        layout = self.layout.grid.layout(spectrogram)
        part = replace(self, spectrogram=spectrogram, layout=layout, cache=None, lookup=None, done=Done())
        found = self.scores(layout, part)
        self.done.flops += part.done.flops
        return layout, found


def looks(masking: Strategy) -> bool:
    """Whether a strategy chooses by what a clip holds: by its spectrogram or by features."""
    return masking.needs in ("spectrogram", "features")


def for_evaluation(masking: Strategy) -> Strategy:
    """Return the strategy of held-out clips: the run's own, but random masks of the same ratio where it looks at clips.

    Masks chosen by content grow harder with the run, and those by features with the model, so that a loss under them
    would say nothing of progress. Random ones are the same at every evaluation, after a resume as well, and in runs
    under other strategies.
    """
    return RandomMasking(mask_ratio=masking.mask_ratio) if looks(masking) else masking


def runs(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return starts[i] ... starts[i] + lengths[i] - 1, one run after another: (sum of lengths,) int64, without waiting
    for the device."""
    total = sum(lengths)
    counts = tuple(lengths)
    shift = torch.tensor(list(starts), dtype=torch.int64) - cumulative(counts, torch.int64, "cpu")[:-1]
    sizes = torch.tensor(counts, dtype=torch.int64)
    shift, sizes = shift.to(device, non_blocking=True), sizes.to(device, non_blocking=True)
    return torch.repeat_interleave(shift, sizes, output_size=total) + torch.arange(total, device=device)


def clips_of(spectrogram: Spectrogram, clips: Sequence[int]) -> Spectrogram:
    """Return the given clips of a batch, by their places in it."""
    device = spectrogram.frames.device
    starts = cumulative(spectrogram.lengths, torch.int64, "cpu").tolist()
    lengths = tuple(spectrogram.lengths[clip] for clip in clips)
    frames = runs([starts[clip] for clip in clips], lengths, device)
    places = torch.tensor(list(clips), dtype=torch.int64).to(device, non_blocking=True)
    return Spectrogram(
        frames=spectrogram.frames.index_select(0, frames),
        lengths=lengths,
        cu_frames=cumulative(lengths, torch.int64, device),
        clip_ids=spectrogram.clip_ids.index_select(0, places),
    )
