# SPDX-License-Identifier: Apache-2.0
"""Scores of patches kept from step to step, so that self-guided masks cost a feature pass once in some epochs.

The data order is cut into periods of `refresh_epochs` epochs. In each period a patch column of a clip is scored when a
crop first holds it, and read from then on; a crop that is not covered whole is scored anew, whole. Crops begin on
patch columns (`column_samples`), so that the patches of two crops of a clip are the same patches.

What is kept is a byte for each patch: its rank among the patches of the crop that it was scored in, in 256ths. Ranks
keep the order of up to 256 patches exactly, and make scores of different crops comparable. A clip of ten seconds in
63 x 5 patches takes 378 bytes.

Which clips are due follows from clip ids, crop starts and the step, all on the host; the bytes stay on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.data.crop import crop_length
from masktrain.data.manifest import Manifest
from masktrain.errors import CheckpointError, ConfigError
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.training.recipe import Recipe
from masktrain.training.step_view import runs
from masktrain.types import AudioBatch, TokenLayout, cumulative

Fresh = Callable[[Sequence[int]], tuple[TokenLayout, Tensor]]
FIELD = "masking.refresh_epochs"


@dataclass(frozen=True)
class Lookup:
    """Where a micro-batch stands in the cache. first: the row of each clip's first column. fresh: clips, by their
    places in the batch, whose scores are due. kept: those of them whose scores are kept, once for each clip."""

    first: tuple[int, ...]
    fresh: tuple[int, ...]
    kept: tuple[int, ...]


def wanted(recipe: Recipe) -> bool:
    """Whether a recipe keeps scores."""
    return isinstance(recipe.masking, SelfGuidedMasking) and recipe.masking.refresh_epochs > 0


def column_samples(recipe: Recipe, rate: int) -> Fraction:
    """Return the samples of one patch column at `rate` Hz."""
    mel = recipe.frontend.mel
    return Fraction(recipe.tokens.patch_time * mel.hop * rate, mel.sample_rate)


def check(recipe: Recipe, ranks: int) -> None:
    """Raise ConfigError where scores of one step would not belong to the patches of a later one."""
    if not wanted(recipe):
        return
    data, patch = recipe.data, recipe.tokens.patch_time
    asked = f"{FIELD}: {recipe.masking.refresh_epochs} epochs of kept scores do not go with"  # type: ignore[union-attr]
    fresh = f"or set {FIELD} to 0 for fresh scores in each step"
    if ranks > 1:
        raise ConfigError(
            f"{asked} {ranks} ranks: each would keep scores of its own, and the run would depend on their number. Take "
            f"one rank, {fresh}."
        )
    if recipe.augment.roll:
        raise ConfigError(
            f"{asked} augment.roll, which puts other patches at a clip's places in each step. Set augment.roll to "
            f"false, {fresh}."
        )
    if data.crop_to_batch_min:
        raise ConfigError(
            f"{asked} data.crop_to_batch_min, which cuts clips between patch columns. Set it to false, {fresh}."
        )
    if data.padding == "reference":
        assert data.target_length is not None
        rate = recipe.frontend.sample_rate
        longest = data.clip_seconds and recipe.frontend.frames_for(round(data.clip_seconds * rate), rate)
        if longest is None or longest > data.target_length + patch // 2:
            raise ConfigError(
                f"{asked} clips that are cut to data.target_length {data.target_length} frames at random places. Set "
                f"data.clip_seconds to {data.target_length / recipe.frontend.frame_rate:g}, {fresh}."
            )


class ScoreCache:
    """The scores of the clips of one run; see the module.

    values: (rows, freq) uint8 on the device, a row for each patch column of each clip that a crop can hold. known:
    (rows,) bool on the host, which rows were scored in this period.
    """

    def __init__(self, recipe: Recipe, manifest: Manifest, device: torch.device) -> None:
        masking = recipe.masking
        assert isinstance(masking, SelfGuidedMasking)
        self.recipe = recipe
        self.refresh = masking.refresh_epochs
        self.clips = len(manifest)
        self.period = 0
        self._columns = {
            int(rate): column_samples(recipe, int(rate)) for rate in np.unique(manifest.sample_rate)
        }
        sizes, place = np.unique(
            np.stack([manifest.num_samples, manifest.sample_rate], axis=1), axis=0, return_inverse=True
        )
        rows = np.array([self._rows(int(n), int(rate)) for n, rate in sizes], dtype=np.int64)[
            place.reshape(-1)
        ]
        self.ends: NDArray[np.int64] = np.cumsum(rows)
        self.starts = self.ends - rows
        total = int(self.ends[-1])
        self.known: NDArray[np.bool_] = np.zeros(total, dtype=np.bool_)
        self.values = torch.zeros(total, recipe.grid.freq, dtype=torch.uint8, device=device)

    def _rows(self, num_samples: int, rate: int) -> int:
        """Return the patch columns of a clip from its first one to the last that any crop holds."""
        recipe, data = self.recipe, self.recipe.data
        length = crop_length(num_samples, rate, data.clip_seconds)
        last = int((num_samples - length) / self._columns[rate]) if data.crop == "random" else 0
        if data.padding == "reference":
            return last + recipe.grid.columns(data.target_length or 0)
        if data.padding == "silence":
            length = max(length, round((data.clip_seconds or 0.0) * rate))
        return last + recipe.grid.columns(recipe.frontend.frames_for(length, rate))

    def lookups(self, step: int, audio: Sequence[AudioBatch], layouts: Sequence[TokenLayout]) -> list[Lookup]:
        """Return where the micro-batches of step `step` stand: together, since they are one batch."""
        period = step * self.recipe.batch_size // self.clips // self.refresh
        if period != self.period:
            self.known[:] = False
            self.period = period
        seen: set[int] = set()
        return [self._lookup(batch, layout, seen) for batch, layout in zip(audio, layouts, strict=True)]

    def _lookup(self, audio: AudioBatch, layout: TokenLayout, seen: set[int]) -> Lookup:
        first, fresh, kept = [], [], []
        clips = zip(
            audio.clip_ids.tolist(), audio.starts.tolist(), audio.sample_rates, layout.columns, strict=True
        )
        for place, (clip, start, rate, columns) in enumerate(clips):
            # a crop starts at the sample below its column
            row = int(self.starts[clip]) - int(-start // self._columns[rate])
            if row + columns > self.ends[clip]:
                raise AssertionError(f"score cache: clip {clip} has more columns than its {self.ends[clip]}")
            first.append(row)
            # what this batch scores is not read in it, or the order of micro-batches would matter
            if clip in seen or not self.known[row : row + columns].all():
                fresh.append(place)
                if clip not in seen:
                    kept.append(place)
                    seen.add(clip)
        return Lookup(tuple(first), tuple(fresh), tuple(kept))

    def scores(self, lookup: Lookup, layout: TokenLayout, fresh: Fresh) -> Tensor:
        """Return (N,) float32 scores in 0 ... 255 of a micro-batch. fresh: computes those that are due, and is called
        where any are. What is kept of them is known from now on."""
        cells = self._cells(lookup, layout)
        found = self.values.view(-1).index_select(0, cells)
        if lookup.fresh:
            ranked = ranks(*fresh(lookup.fresh))
            tokens = _tokens(layout, lookup.fresh)
            found.index_copy_(0, tokens, ranked)
            kept = tokens if lookup.kept == lookup.fresh else _tokens(layout, lookup.kept)
            self.values.view(-1).index_copy_(0, cells.index_select(0, kept), found.index_select(0, kept))
            for place in lookup.kept:
                row = lookup.first[place]
                self.known[row : row + layout.columns[place]] = True
        return found.float()

    def _cells(self, lookup: Lookup, layout: TokenLayout) -> Tensor:
        """Return (N,) int64: where the byte of each token is."""
        freq, device = layout.grid.freq, layout.cu_tokens.device
        cells = runs([row * freq for row in lookup.first], layout.lengths, device)
        if layout.grid.order == "time" or freq == 1:
            return cells
        # a token of frequency-major order is row * columns + column within its clip
        sizes, columns, base = (
            torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
            for values in (layout.lengths, layout.columns, [row * freq for row in lookup.first])
        )
        total = sum(layout.lengths)
        base, columns = (torch.repeat_interleave(x, sizes, output_size=total) for x in (base, columns))
        local = cells - base
        return base + local % columns * freq + torch.div(local, columns, rounding_mode="floor")

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds as tensors."""
        return {"values": self.values, "known": torch.from_numpy(self.known.view(np.uint8))}

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside them."""
        return {"period": self.period}

    def load(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore what `tensors` and `state` returned. Raises CheckpointError for anything else."""
        own = self.tensors()
        fits = tensors.keys() == own.keys() and all(
            tensors[name].shape == tensor.shape and tensors[name].dtype == tensor.dtype
            for name, tensor in own.items()
        )
        period = state.get("period") if isinstance(state, Mapping) else None
        if not fits or type(period) is not int or period < 0:
            raise CheckpointError("the kept scores do not fit the clips and the token grid of this run.")
        self.values.copy_(tensors["values"])
        self.known[:] = tensors["known"].numpy().astype(np.bool_)
        self.period = period


def ranks(layout: TokenLayout, scores: Tensor) -> Tensor:
    """Return (N,) uint8: 256ths of the rank of each token's score within its clip, of equal ones the lower token's the
    higher, so that the largest ranks of up to 256 tokens are the largest scores as `select_tokens` takes them."""
    total, device = len(scores), scores.device
    sizes = torch.tensor(layout.lengths, dtype=torch.int64).to(device, non_blocking=True)
    places = torch.arange(len(layout.lengths), device=device)
    clip = torch.repeat_interleave(places, sizes, output_size=total)
    order = scores.argsort(descending=True, stable=True)
    order = order.index_select(0, clip.index_select(0, order).argsort(stable=True))
    ends = layout.cu_tokens[1:].long().index_select(0, clip)
    below = ends - 1 - torch.arange(total, device=device)
    share = torch.div(below * 256, sizes.index_select(0, clip), rounding_mode="floor")
    return torch.empty_like(share).index_copy(0, order, share).to(torch.uint8)


def _tokens(layout: TokenLayout, clips: Sequence[int]) -> Tensor:
    """Return (K,) int64: the tokens of some clips, by their places in the batch."""
    starts = cumulative(layout.lengths, torch.int64, "cpu").tolist()
    return runs(
        [starts[clip] for clip in clips], [layout.lengths[clip] for clip in clips], layout.cu_tokens.device
    )
