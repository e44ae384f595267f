# SPDX-License-Identifier: Apache-2.0
"""What does each masking strategy cost, ours and as published, beside a training step of the same batch?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from masktrain.recipes import find
from masktrain.training.masking_bench.rows import GRIDS, Size, bench, scaling
from masktrain.training.measure import Stopwatch
from suite.harness import Check, Row

BATCHES = (512, 64)
SECONDS = 1.0
# In the rehearsal the grids are cut to so many columns.
FEW = 4


def checks(device: torch.device, *, rehearsal: bool) -> Iterator[Check]:
    """Yield a check for each recipe of the published grids, and one for the growth with the clip."""
    for size in GRIDS.values():
        for recipe in size.recipes:
            yield Check(
                f"bench masking {recipe}",
                f"What does each masking strategy cost on the grid {size.name}, as a share of a step of {recipe}?",
                partial(_bench, device, size, recipe, rehearsal),
            )
    if not rehearsal:
        yield Check(
            "bench masking growth",
            "How does the time of each masking strategy grow with the tokens of a clip?",
            lambda: list(scaling(Stopwatch(device), SECONDS)),
        )


def _bench(device: torch.device, size: Size, recipe: str, rehearsal: bool) -> list[Row]:
    found = find(recipe, "tiny" if rehearsal else "base")
    if rehearsal:
        return list(bench(replace(size, columns=FEW), found, Stopwatch(device), 1, 0.0))
    watch = Stopwatch(device)
    rows = [row for clips in BATCHES for row in bench(size, found, watch, clips, SECONDS)]
    # what does not fit is a row of its own, and not an error of the check
    return [{**row, "row_status": row["status"], "status": "ok"} for row in rows]
