# SPDX-License-Identifier: Apache-2.0
"""MaskPlans: their counts, plans from chosen tokens or explicit ids, and what every plan must satisfy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masktrain.types import MaskPlan, TokenLayout, cumulative


def visible_count(n: int, mask_ratio: float) -> int:
    """Return how many of `n` tokens stay visible: max(1, int(n * (1 - mask_ratio))) in double precision.

    The reference codes cut, they do not round, and floating point decides: 190 tokens at 0.8 leave 37, not 38
    (nttcslab/m2d:m2d/models_mae.py). A clip without tokens has none.
    """
    return min(n, max(1, int(n * (1 - mask_ratio))))


def cumulative_counts(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Return (B+1,) int32. Equal counts need no copy from the host, which a CUDA graph could not capture."""
    if len(set(counts)) == 1:
        return torch.arange(len(counts) + 1, dtype=torch.int32, device=device) * counts[0]
    return cumulative(counts, torch.int32, device)


def make_plan(layout: TokenLayout, visible: Tensor, masked: Tensor, n_visible: tuple[int, ...]) -> MaskPlan:
    """Return the plan of (V,) and (M,) int32 ids that count through the batch, ascending."""
    n_masked = tuple(n - v for n, v in zip(layout.lengths, n_visible, strict=True))
    device = layout.cu_tokens.device
    return MaskPlan(
        layout=layout,
        visible=visible,
        masked=masked,
        n_visible=n_visible,
        n_masked=n_masked,
        cu_visible=cumulative_counts(n_visible, device),
        cu_masked=cumulative_counts(n_masked, device),
    )


def unmasked(layout: TokenLayout) -> MaskPlan:
    """Return the plan under which every token is visible, as evaluation has it."""
    total, device = sum(layout.lengths), layout.cu_tokens.device
    every = torch.arange(total, dtype=torch.int32, device=device)
    return make_plan(layout, every, every[:0], layout.lengths)


def plan_from_ids(layout: TokenLayout, visible: Sequence[Sequence[int]]) -> MaskPlan:
    """Return the plan that keeps the given tokens of each clip and masks all others.

    visible: for each clip the numbers of its visible tokens, counted from the clip's first, in any order.
    Raises ValueError for a number that is outside of the clip or given twice, or a wrong number of clips.
    """
    if len(visible) != len(layout.lengths):
        raise ValueError(
            f"plan_from_ids: expected ids for {len(layout.lengths)} clips, received {len(visible)}."
        )
    shown: list[int] = []
    hidden: list[int] = []
    start = 0
    for clip, (ids, n) in enumerate(zip(visible, layout.lengths, strict=True)):
        chosen = {int(t) for t in ids}
        if len(chosen) != len(ids) or not chosen <= set(range(n)):
            raise ValueError(
                f"plan_from_ids: clip {clip} needs distinct tokens from 0 to {n - 1}, received {sorted(ids)}."
            )
        for t in range(n):
            (shown if t in chosen else hidden).append(start + t)
        start += n
    device = layout.cu_tokens.device
    return make_plan(
        layout,
        torch.tensor(shown, dtype=torch.int32).to(device),
        torch.tensor(hidden, dtype=torch.int32).to(device),
        tuple(len(ids) for ids in visible),
    )


def check_plan(plan: MaskPlan) -> None:
    """Raise ValueError unless `plan` keeps every promise of MaskPlan. Waits for the device: for tests."""
    layout = plan.layout
    for name, ids, counts, cu in (
        ("visible", plan.visible, plan.n_visible, plan.cu_visible),
        ("masked", plan.masked, plan.n_masked, plan.cu_masked),
    ):
        if ids.dtype != torch.int32 or cu.dtype != torch.int32:
            raise ValueError(
                f"plan: {name} and its cumulative counts must be int32, are {ids.dtype}, {cu.dtype}."
            )
        if cu.tolist() != cumulative(counts, torch.int32, "cpu").tolist():
            raise ValueError(f"plan: cu_{name} is {cu.tolist()}, but the counts are {counts}.")
        if len(ids) != sum(counts):
            raise ValueError(f"plan: {name} has {len(ids)} ids, but the counts add up to {sum(counts)}.")
        if not bool((ids[1:] > ids[:-1]).all()):
            raise ValueError(f"plan: {name} does not ascend.")
        clip = torch.searchsorted(layout.cu_tokens, ids, right=True) - 1
        if torch.bincount(clip, minlength=len(counts)).tolist() != list(counts):
            raise ValueError(f"plan: {name} holds other numbers of tokens than its counts {counts}.")
    together = torch.cat([plan.visible, plan.masked]).sort().values
    if together.tolist() != list(range(sum(layout.lengths))):
        raise ValueError("plan: visible and masked are not a partition of the tokens.")
