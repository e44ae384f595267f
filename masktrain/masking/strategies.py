# SPDX-License-Identifier: Apache-2.0
"""Masking strategies that need nothing but the token grid: random tokens, chunks, whole frames.

A strategy is a frozen config, whose fields are the recipe's fields under `masking`, with a method that turns
the tokens of a batch and the step's key into a MaskPlan. `needs` says what else it wants to see ("nothing"
here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.kernels.block_marks import block_marks
from masktrain.kernels.select_tokens import select_tokens
from masktrain.masking.plan import cumulative_counts, make_plan, visible_count
from masktrain.masking.view import View
from masktrain.types import MaskPlan, StepKey, TokenLayout


def check_ratio(mask_ratio: object) -> None:
    """Raise ConfigError unless mask_ratio is a share of the tokens."""
    if not isinstance(mask_ratio, int | float) or not 0 < mask_ratio < 1:
        raise ConfigError(
            f"masking.mask_ratio: the share of masked tokens must lie between 0 and 1, both excluded; "
            f"received {mask_ratio!r}. Most recipes use 0.75."
        )


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value of `field` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"masking.{field}: {value!r} is not known; allowed: {', '.join(allowed)}.")


def _check_equal_lengths(layout: TokenLayout) -> None:
    if len(set(layout.lengths)) > 1:
        raise ConfigError(
            f"masking.shared_in_batch: one mask for the batch needs clips of equal length, received clips of "
            f"{min(layout.lengths)} to {max(layout.lengths)} tokens. Set masking.shared_in_batch=false, or "
            f"bring the clips to one length."
        )


@dataclass(frozen=True, kw_only=True)
class RandomMasking:
    """Tokens masked uniformly at random, an exact count per clip.

    mask_ratio: share of masked tokens, in (0, 1). shared_in_batch: one mask for all clips of the batch.
    """

    name: ClassVar[str] = "random"
    needs: ClassVar[str] = "nothing"

    mask_ratio: float = 0.75
    shared_in_batch: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: not looked at."""
        if self.shared_in_batch:
            _check_equal_lengths(layout)
        n_visible = tuple(visible_count(n, self.mask_ratio) for n in layout.lengths)
        visible, masked = select_tokens(
            layout.cu_tokens,
            layout.lengths,
            n_visible,
            key.counter,
            layout.clip_ids,
            shared=self.shared_in_batch,
            stream=draw,
        )
        return make_plan(layout, visible, masked, n_visible)


@dataclass(frozen=True, kw_only=True)
class ChunkMasking:
    """Square chunks of tokens masked until the count is reached; each clip draws one side for all its chunks.

    mask_ratio: share of masked tokens, in (0, 1). sides: the sides to choose from, in tokens. growth:
    "clipped" cuts chunks at the grid's edges; "wrap" lets them run on into the next row, as SSAST and MAE-AST
    do. truncation: "random" drops the surplus uniformly; "first" drops it at the end of the token order, as
    they do. spare_first: token 0 is never masked (SSAST). shared_in_batch: one mask for all clips of the
    batch (MAE-AST).
    """

    name: ClassVar[str] = "chunk"
    needs: ClassVar[str] = "nothing"

    mask_ratio: float = 0.75
    sides: tuple[int, ...] = (3, 4, 5)
    growth: Literal["clipped", "wrap"] = "clipped"
    truncation: Literal["random", "first"] = "random"
    spare_first: bool = False
    shared_in_batch: bool = False

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)
        if not isinstance(self.sides, tuple) or not self.sides:
            raise ConfigError(
                f"masking.sides: expected at least one side such as (3, 4, 5), received {self.sides!r}."
            )
        if any(type(side) is not int or side < 1 for side in self.sides):
            raise ConfigError(
                f"masking.sides: sides are whole numbers of at least 1, received {self.sides!r}."
            )
        check_choice("growth", self.growth, ("clipped", "wrap"))
        check_choice("truncation", self.truncation, ("random", "first"))

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: not looked at."""
        if self.shared_in_batch:
            _check_equal_lengths(layout)
        n_visible = tuple(visible_count(n, self.mask_ratio) for n in layout.lengths)
        marks = block_marks(
            layout.cu_tokens,
            layout.lengths,
            tuple(n - v for n, v in zip(layout.lengths, n_visible, strict=True)),
            key.counter,
            layout.clip_ids,
            freq=layout.grid.freq,
            order=layout.grid.order,
            sides=self.sides,
            growth=self.growth,
            truncation=self.truncation,
            spare_first=self.spare_first,
            shared=self.shared_in_batch,
            stream=draw,
        )
        visible, masked = select_tokens(
            layout.cu_tokens,
            layout.lengths,
            n_visible,
            key.counter,
            layout.clip_ids,
            classes=marks,
            shared=self.shared_in_batch,
            stream=draw,
        )
        return make_plan(layout, visible, masked, n_visible)


@dataclass(frozen=True, kw_only=True)
class FrameMasking:
    """Whole time columns masked: all tokens of a column together. Where a token is a column, RandomMasking.

    mask_ratio: share of masked columns, in (0, 1).
    """

    name: ClassVar[str] = "frame"
    needs: ClassVar[str] = "nothing"

    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        check_ratio(self.mask_ratio)

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        """Return a mask of one batch; the draws of a step are independent. view: not looked at."""
        clip, column, _ = token_places(layout)
        kept = tuple(visible_count(c, self.mask_ratio) for c in layout.columns)
        rows = (layout.grid.freq,) * len(layout.columns)
        return mask_units(layout, key, layout.columns, clip, column, rows, kept, draw)


def token_places(layout: TokenLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Return clip (N,) int64, and column and row (N,) int32 in the clip's grid, of each token of the batch."""
    grid, cu_tokens = layout.grid, layout.cu_tokens
    token = torch.arange(sum(layout.lengths), dtype=torch.int32, device=cu_tokens.device)
    clip = torch.searchsorted(cu_tokens, token, right=True) - 1
    first = cu_tokens[clip]
    local = token - first
    if grid.order == "time":
        return clip, local // grid.freq, local % grid.freq
    columns = (cu_tokens[clip + 1] - first) // grid.freq
    return clip, local % columns, local // columns


def mask_units(
    layout: TokenLayout,
    key: StepKey,
    n_units: tuple[int, ...],
    clip: Tensor,
    unit: Tensor,
    unit_tokens: tuple[int, ...],
    kept: tuple[int, ...],
    stream: int,
) -> MaskPlan:
    """Return the plan in which units of tokens are masked together, as columns or rows are.

    n_units, unit_tokens, kept: how many units each clip has, how many tokens each of its units has, and how many units
    stay visible, drawn uniformly. clip, unit: (N,) the clip of each token, and its unit, counted from 0 in the
    clip. stream: of the draw.
    """
    cu_tokens = layout.cu_tokens
    cu_units = cumulative_counts(n_units, cu_tokens.device)
    _, hidden = select_tokens(cu_units, n_units, kept, key.counter, layout.clip_ids, stream=stream)
    unit_hidden = torch.zeros(sum(n_units), dtype=torch.uint8, device=cu_tokens.device)
    unit_hidden[hidden] = 1
    return plan_of_hidden(
        layout,
        key,
        unit_hidden[cu_units[clip] + unit],
        tuple(k * t for k, t in zip(kept, unit_tokens, strict=True)),
        stream,
    )


def plan_of_hidden(
    layout: TokenLayout, key: StepKey, hidden: Tensor, n_visible: tuple[int, ...], stream: int
) -> MaskPlan:
    """Return the plan of n_visible tokens of each clip, at first of those that are not hidden; among equals the choice
    is uniform. hidden: (N,) uint8, 1 or 0. stream: of the draw."""
    visible, masked = select_tokens(
        layout.cu_tokens,
        layout.lengths,
        n_visible,
        key.counter,
        layout.clip_ids,
        classes=hidden,
        stream=stream,
    )
    return make_plan(layout, visible, masked, n_visible)
