# SPDX-License-Identifier: Apache-2.0
"""`masktrain bench masking`: what each masking strategy costs, ours and as published, and the picture of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from masktrain.training.bench import provenance
from masktrain.training.masking_bench.rows import Row, Size, bench, exponents, scaling
from masktrain.training.measure import Stopwatch
from masktrain.training.recipe import Recipe


def run(
    recipes: Sequence[tuple[Size, Recipe]],
    watch: Stopwatch,
    batches: Sequence[int],
    seconds: float,
    *,
    scale: bool,
    said: Callable[[str], object],
) -> Row:
    """Return the report: made_with, rows, scaling, exponents.

    batches, seconds: see `rows.bench`. scale: also measure the growth with the tokens of a clip. said: is told what is
    timed next.
    """
    rows: list[Row] = []
    for size, recipe in recipes:
        for clips in batches:
            said(f"{recipe.name} {recipe.size}, {clips} clips")
            rows += bench(size, recipe, watch, clips, seconds)
    grown: list[Row] = []
    if scale:
        said("the growth with the tokens of a clip")
        grown += scaling(watch, seconds)
    return {
        "made_with": provenance(watch.device),
        "rows": rows,
        "scaling": grown,
        "exponents": exponents(grown),
    }
