# SPDX-License-Identifier: Apache-2.0
"""`masktrain bench`: how fast each op is here, against its eager and compiled reference and against the machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from masktrain.cli.options import parse, write_json
from masktrain.errors import ConfigError, nearest

ACTIONS = ("kernels", "attention")
USAGE = """usage: masktrain bench kernels|attention [--device DEVICE] [--seconds N] [--no-compile] [--json PATH]
"""
# 4000 and 64000 tokens on a GPU; on a CPU what the references finish in seconds.
CLIPS = {"cpu": (4,), "cuda": (8, 128)}
SHOWN = (
    "op",
    "provider",
    "mode",
    "dtype",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "n",
    "roofline_share",
    "bound",
    "case",
    "detail",
)


@dataclass(frozen=True)
class Options:
    """Time every implementation of the ops, at the sizes of the recipes."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seconds: float = 0.5
    """Time for each op, provider and mode."""
    recipe: str | None = None
    """Sizes of this recipe only; without it, of one recipe for each form and shape that an op has."""
    size: str = "base"
    """Named size of the recipe's model: tiny, small or base."""
    compile: bool = True
    """Also time the reference under torch.compile, which takes a while to compile."""
    json: Path | None = None
    """Also write the rows there."""


def main(arguments: list[str]) -> None:
    """Run `masktrain bench ACTION`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    action = arguments[0]
    if action not in ACTIONS:
        raise ConfigError(
            f"bench: no action {action!r}.{nearest(action, ACTIONS)} Allowed: {', '.join(ACTIONS)}."
        )
    options = parse(Options, f"bench {action}", arguments[1:])
    if not 0 <= options.seconds < 1e6:
        raise ConfigError(f"--seconds: must be at least 0; received {options.seconds}.")

    from masktrain.recipes import find
    from masktrain.training.bench import DTYPES, GROUPS, bench, ceiling_rows, provenance
    from masktrain.training.distributed import pick_device
    from masktrain.training.measure import Ceilings, Stopwatch
    from masktrain.training.op_cases import REPRESENTATIVES, ops_of, representative_ops

    found = [find(name, options.size) for name in ([options.recipe] if options.recipe else REPRESENTATIVES)]
    recipes = []
    for recipe in found:
        ops = ops_of(recipe) if options.recipe else representative_ops(recipe)
        recipes.append((recipe, [op for op in ops if op in GROUPS[action]]))
    device = pick_device(options.device)
    watch = Stopwatch(device)
    ceilings = Ceilings(watch)
    calibration = ceiling_rows(ceilings, DTYPES[device.type])
    made_with = provenance(device)
    console = Console() if sys.stdout.isatty() else Console(width=250)
    console.print(f"{made_with['device']}, torch {made_with['torch']}")
    for row in calibration:
        console.print(", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{v}:" for k, v in row.items()))
    rows: list[dict[str, Any]] = []
    shown = set()
    for clips in CLIPS[device.type]:
        for row in bench(
            recipes,
            watch,
            ceilings,
            clips=clips,
            seconds=options.seconds,
            compiled=options.compile,
        ):
            rows.append(row)
            if row["op"] not in shown:
                shown.add(row["op"])
                print(f"timing {row['op']} ...", file=sys.stderr)
    console.print(_table(rows))
    write_json(options.json, {"made_with": made_with, "calibration": calibration, "rows": rows})


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(*SHOWN, box=None)
    for row in rows:
        table.add_row(*(_text(name, row.get(name)) for name in SHOWN))
    return table


def _text(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}" if name.endswith("share") else f"{value:.4g}"
    return str(value)
