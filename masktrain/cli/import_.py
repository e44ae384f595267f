# SPDX-License-Identifier: Apache-2.0
"""`masktrain import`: published weights of a reference project become a checkpoint that --init-from takes."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from masktrain.cli.options import override, parse_known, write_json
from masktrain.errors import ConfigError, RunError

if TYPE_CHECKING:
    from masktrain.training.foreign import ForeignWeights
    from masktrain.training.recipe import Recipe
    from masktrain.training.weights import Imported


@dataclass(frozen=True)
class Options:
    """Turn published weights (safetensors, npz, or a torch file, which is read as data and never run) into a folder
    that --init-from takes: tensors, and the recipe with its front end.

    Sizes, positions and statistics come from the file. Any field of the recipe is an option as well, as in
    `masktrain run`: --model.heads 3, --tokens.patch-time 8.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """The file of the weights."""
    recipe: Annotated[str | None, tyro.conf.arg(aliases=["--as"])] = None
    """The recipe whose weights these are; `masktrain recipes list` shows all."""
    size: Literal["tiny", "small", "base"] | None = None
    """Named size that gives the number of heads; default the one that is as wide as the weights."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The folder to make; default imported/RECIPE_FILE."""
    allow_missing: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A name of the reference that the file may lack, drawn anew then; may be repeated, and be a pattern: 'decoder_*'."""
    ignore: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A name in the file to leave out; may be repeated, and be a pattern."""
    statistics: Path | None = None
    """Mean and standard deviation of each mel bin (npy), for MaskSpec: its mean_std_128.npy."""
    json: Path | None = None
    """Also write the report there."""


def main(arguments: list[str]) -> None:
    """Run `masktrain import`."""
    options, rest = parse_known(Options, "import", arguments)
    if len(options.files) != 1:
        raise ConfigError(f"import: expected one file of weights; received {len(options.files)}.")
    if options.recipe is None:
        raise ConfigError(
            "import: --as RECIPE is missing, the recipe whose weights these are. `masktrain recipes list` shows all."
        )
    from masktrain.recipes import find
    from masktrain.training.console import Console
    from masktrain.training.foreign import read_statistics, read_weights
    from masktrain.training.weights import import_weights, known_project

    (file,) = options.files
    known_project(find(options.recipe, options.size or "base").name)
    out = (options.out or Path("imported") / f"{options.recipe}_{file.stem}").absolute()
    if os.path.lexists(out):
        raise ConfigError(
            f"--out {out}: exists already, and nothing is overwritten. Name another folder (-o)."
        )
    weights = read_weights(file)
    statistics = read_statistics(options.statistics) if options.statistics else None
    imported = import_weights(
        _recipe(options, rest, weights),
        weights,
        asked=_fields(rest),
        allow_missing=options.allow_missing,
        ignore=options.ignore,
        statistics=statistics,
    )
    _save(imported, out, file)
    run = f"masktrain run {_run_options(imported.recipe)} --init-from {shlex.quote(str(out))}"
    values = sum(tensor.numel() for tensor in imported.model.values())
    with Console() as console:
        for note in imported.notes:
            (console.warn if note.startswith("warning: ") else console.note)(note.removeprefix("warning: "))
        console.finish(
            [
                (
                    "weights",
                    f"{imported.project}, {len(imported.model)} tensors, {values / 1e6:.1f} M values",
                ),
                ("recipe", f"{imported.recipe.name}, front end {imported.recipe.frontend.preset}"),
                ("folder", str(out)),
                ("train on", run),
            ]
        )
    report = {
        "out": str(out),
        "project": imported.project,
        "recipe": imported.recipe.name,
        "tensors": len(imported.model),
        "values": values,
        "kept": sorted(imported.kept),
        "notes": list(imported.notes),
        "run": run,
    }
    write_json(options.json, report)


def _recipe(options: Options, rest: list[str], weights: ForeignWeights) -> Recipe:
    """Return the recipe in the size asked for, or in the first that is as wide as the weights, with the sizes of the
    weights and what else was given."""
    from masktrain.recipes import SIZES, find
    from masktrain.training.run_spec import check_numbers
    from masktrain.training.weights import fitting

    assert options.recipe is not None
    sizes = (options.size,) if options.size else tuple(reversed(SIZES))
    recipe, given = fitting(
        [find(options.recipe, size) for size in sizes], weights, _fields(rest), options.ignore
    )
    recipe = override(recipe, "import", [*rest, *given], Options)
    check_numbers(recipe)
    return recipe


def _run_options(recipe: Recipe) -> str:
    """Return the options of `masktrain run` that make a model for these weights."""
    from masktrain.config import differences
    from masktrain.recipes import find

    options = [f"--recipe {recipe.name}", *([] if recipe.size == "base" else [f"--size {recipe.size}"])]
    for field, _, value in differences(find(recipe.name, recipe.size), recipe):
        group, _, name = field.rpartition(".")
        flag = f"{group}.{'no-' if value is False else ''}{name}".replace("_", "-")
        options.append(f"--{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    return " ".join(options)


def _fields(rest: Sequence[str]) -> set[str]:
    """Return the dotted fields that were given as options."""
    flags = [argument.partition("=")[0] for argument in rest if argument.startswith("--")]
    fields = {flag.removeprefix("--").replace("-", "_") for flag in flags}
    return fields | {field.replace(".no_", ".") for field in fields}


def _save(imported: Imported, out: Path, file: Path) -> None:
    """Write the folder, whole or not at all."""
    from masktrain.config import to_dict
    from masktrain.training import checkpoint, storage
    from masktrain.training.weights import KEPT

    groups = {"model": imported.model, **({KEPT: imported.kept} if imported.kept else {})}
    record = storage.record_of(file.resolve())
    data: dict[str, Any] = {
        "recipe": imported.recipe.name,
        "recipe_config": to_dict(imported.recipe),
        "imported": {"file": ascii(file.name), "sha256": record.sha256, "project": imported.project},
    }
    try:
        checkpoint.save(out / "checkpoints", 0, groups, data, keep_last=1)
    except RunError as error:
        shutil.rmtree(out, ignore_errors=True)
        cause = error.__cause__
        why = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
        raise RunError(f"--out {out}: cannot be written ({why}). Name another folder (-o).") from error
