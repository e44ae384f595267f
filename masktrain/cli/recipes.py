# SPDX-License-Identifier: Apache-2.0
"""`masktrain recipes`: what can be trained, every value of a recipe, and how two recipes differ."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from masktrain.cli.options import parse, write_json
from masktrain.config import differences, flatten, to_dict
from masktrain.errors import ConfigError, nearest
from masktrain.recipes import RECIPES, SIZES, find

# what is said about a recipe's values, and its class
PROSE = ("type", "readings", "sources")
ACTIONS = ("list", "show", "diff")
USAGE = """usage: masktrain recipes list [--json PATH]
       masktrain recipes show NAME[:SIZE] [--json PATH]
       masktrain recipes diff A[:SIZE] B[:SIZE] [--json PATH]

Sizes: tiny, small, base (the published one, which is meant where none is named).
"""


@dataclass(frozen=True)
class Options:
    """Recipes by name, NAME or NAME:SIZE."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """NAME[:SIZE] ..."""
    json: Path | None = None
    """Also write the report there."""


def main(arguments: list[str]) -> None:
    """Run `masktrain recipes ACTION`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    action = arguments[0]
    if action not in ACTIONS:
        raise ConfigError(
            f"recipes: no action {action!r}.{nearest(action, ACTIONS)} Allowed: {', '.join(ACTIONS)}."
        )
    options = parse(Options, f"recipes {action}", arguments[1:])
    expected = {"list": 0, "show": 1, "diff": 2}[action]
    if len(options.names) != expected:
        raise ConfigError(
            f"recipes {action}: expected {expected} names, received {len(options.names)}.\n{USAGE}"
        )
    report = {"list": _list, "show": _show, "diff": _diff}[action](options.names)
    write_json(options.json, report)


def _named(name: str) -> Any:
    recipe, _, size = name.partition(":")
    return find(recipe, size or SIZES[-1])


def _print(table: Table) -> None:
    # a pipe has no width: print whole values there
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def _list(names: tuple[str, ...]) -> Any:
    table = Table("recipe", "what it is", box=None)
    for name, (_, line) in RECIPES.items():
        table.add_row(name, line)
    _print(table)
    print(f"Sizes: {', '.join(SIZES)} (base is the published one).")
    return {name: line for name, (_, line) in RECIPES.items()}


def _show(names: tuple[str, ...]) -> Any:
    recipe = _named(names[0])
    own = {field for field, _, _ in differences(recipe, find(recipe.name, SIZES[-1]))}
    table = Table("field", "value", "source", box=None)
    for field, value in flatten(recipe).items():
        if field not in PROSE:
            source = f"size {recipe.size} of this project" if field in own else recipe.source(field)
            table.add_row(field, str(value), source)
    _print(table)
    print("Readings:")
    for reading in recipe.readings:
        print(f"  - {reading}")
    return to_dict(recipe)


def _diff(names: tuple[str, ...]) -> Any:
    rows = differences(_named(names[0]), _named(names[1]))
    table = Table("field", names[0], names[1], box=None)
    for field, a, b in rows:
        if field not in PROSE:
            table.add_row(field, str(a), str(b))
    _print(table)
    return [{"field": field, names[0]: a, names[1]: b} for field, a, b in rows]
