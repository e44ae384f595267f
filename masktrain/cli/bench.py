# SPDX-License-Identifier: Apache-2.0
"""`masktrain bench`: how fast each op is here, against its eager and compiled reference and against the machine, and
what each masking strategy costs beside a training step."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from masktrain.cli.options import check_writable, parse, write_json
from masktrain.errors import ConfigError, nearest

ACTIONS = ("kernels", "attention", "masking")
USAGE = """usage: masktrain bench kernels|attention [--device DEVICE] [--seconds N] [--no-compile] [--json PATH]
       masktrain bench masking [--grids 5x38,8x62,64x8] [--batch-sizes N,N] [--json PATH] [-o masking.png]
`masktrain bench ACTION --help` lists the options.
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


@dataclass(frozen=True)
class MaskingOptions:
    """Time every masking strategy, ours and as published, beside a training step of the same batch."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    grids: str = "5x38,8x62,64x8"
    """Token grids: 5x38 (msm_mae), 8x62 (mae_ast_patch, maskspec), 64x8 (audiomae)."""
    batch_sizes: str | None = None
    """Clips of a batch, numbers with commas between; by default 1,4,8 on a CPU and 32,128,512 on a GPU."""
    size: Literal["tiny", "small", "base"] | None = None
    """Named size of the recipes' models; by default tiny on a CPU and base, the published one, on a GPU."""
    seconds: float = 4.0
    """Time for each recipe and batch size, and for each length of the growth with N; never fewer than five rounds."""
    scaling: bool = True
    """Also time how each strategy grows with the tokens of a clip."""
    json: Path | None = None
    """Also write the rows there."""
    picture: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Also draw them there, as PNG."""


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
    if action == "masking":
        _masking(parse(MaskingOptions, "bench masking", arguments[1:]))
        return
    options = parse(Options, f"bench {action}", arguments[1:])
    _check_seconds(options.seconds)

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


def _check_seconds(seconds: float) -> None:
    if not 0 <= seconds < 1e6:
        raise ConfigError(f"--seconds: must be at least 0; received {seconds}.")


def _masking(options: MaskingOptions) -> None:
    """Run `masktrain bench masking`."""
    _check_seconds(options.seconds)
    batches = _numbers("--batch-sizes", options.batch_sizes)
    if options.picture is not None:
        if options.picture.suffix.lower() != ".png":
            raise ConfigError(f"--picture {options.picture}: expected a name ending in .png.")
        check_writable(options.picture, "--picture")

    from masktrain.training.distributed import pick_device
    from masktrain.training.masking_bench import run
    from masktrain.training.masking_bench.rows import GRIDS, batch_sizes
    from masktrain.training.measure import Stopwatch

    names = list(dict.fromkeys(options.grids.split(",")))
    for name in names:
        if name not in GRIDS:
            raise ConfigError(
                f"--grids: no grid {name!r}.{nearest(name, GRIDS)} Allowed: {', '.join(GRIDS)}, with commas between."
            )
    device = pick_device(options.device)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    report = run(
        _recipes(names, options.size or ("base" if device.type == "cuda" else "tiny")),
        Stopwatch(device),
        batches or batch_sizes(device),
        options.seconds,
        scale=options.scaling,
        said=lambda what: print(f"timing {what} ...", file=sys.stderr),
    )
    made_with = report["made_with"]
    console.print(f"{made_with['device']}, torch {made_with['torch']}")
    console.print(_masking_table(report["rows"]))
    if report["scaling"]:
        console.print(_scaling_table(report))
    write_json(options.json, report)
    if options.picture is not None:
        from masktrain.training.drawing import save
        from masktrain.training.masking_bench.picture import cost_figure

        save(cost_figure(report), options.picture)


def _recipes(grids: list[str], size: str) -> list[Any]:
    """Return (grid, recipe) of every recipe of the named grids."""
    from masktrain.recipes import find
    from masktrain.training.masking_bench.rows import GRIDS

    return [(GRIDS[name], find(recipe, size)) for name in grids for recipe in GRIDS[name].recipes]


def _numbers(name: str, text: str | None) -> tuple[int, ...]:
    """Return whole numbers of at least 1 with commas between; none for None."""
    parts = text.split(",") if text is not None else []
    for part in parts:
        if not (part.isascii() and part.isdigit() and 1 <= int(part) <= 1 << 20):
            raise ConfigError(
                f"{name}: expected whole numbers of at least 1 with commas between, such as 4,16; received {text!r}."
            )
    return tuple(dict.fromkeys(int(part) for part in parts))


def _masking_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of the strategies, a section for each recipe and batch size."""
    columns = ("strategy", "median ms", "p20", "p80", "n", "clips/s", "memory MiB", "x random", "of a step", "with refreshes")  # fmt: skip
    table = Table(box=None, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "strategy" else "right")
    section = None
    for row in rows:
        heading = f"{row['recipe']} {row['size']}, {row['grid']}, {row['clips']} clips"
        if heading != section:
            section = heading
            table.add_section()
            table.add_row(f"[bold]{heading}[/bold]")
        if row["status"] != "ok":
            table.add_row(f"  {row['strategy']}", row["status"])
            continue
        shares = (row.get("share_of_step"), row.get("share_of_step_with_refresh"))
        table.add_row(
            f"  {row['strategy']}",
            *(f"{row[f'{q}_ms']:.4g}" for q in ("median", "p20", "p80")),
            str(row["n"]),
            f"{row['clips_per_s']:.4g}",
            f"{row['peak_memory_bytes'] / 2**20:.3g}",
            f"{row['ratio_to_random']:.3g}" if "ratio_to_random" in row else "-",
            *("" if share is None else f"{share:.2%}" for share in shares),
        )
    return table


def _scaling_table(report: dict[str, Any]) -> Table:
    """Return the table of how the times of a batch grow with the tokens of a clip."""
    rows = report["scaling"]
    lengths = sorted({row["tokens"] for row in rows})
    table = Table(box=None)
    table.add_column(f"ms at N tokens, {rows[0]['clips']} clips")
    for head in (*(f"N = {n}" for n in lengths), "grows as"):
        table.add_column(head, justify="right")
    for name in dict.fromkeys(row["strategy"] for row in rows):
        own = {row["tokens"]: row["median_ms"] for row in rows if row["strategy"] == name}
        cells = [f"{own[n]:.4g}" if n in own else "-" for n in lengths]
        power = report["exponents"].get(name)
        table.add_row(name, *cells, "-" if power is None else f"N^{power:.1f}")
    return table


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
