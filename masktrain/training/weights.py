# SPDX-License-Identifier: Apache-2.0
"""Published weights into our checkpoints, and checkpoints into the names of the reference projects or of timm.

Names and shapes are those of masktrain/models/adapters/registry.py. Every tensor of a file is used, kept, or named in
an error. Kept, in a group of its own beside the weights, is what the reference has without use for us (position
tables, unused layers) where it differs from what export would write anyway: so a file comes back as it was, bit for
bit.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masktrain.config import from_dict
from masktrain.errors import CheckpointError, ConfigError, nearest
from masktrain.models import registry
from masktrain.models.adapters.registry import PROJECTS, Project, looks_like, project_of
from masktrain.models.input_norm import InputNorm
from masktrain.training import checkpoint
from masktrain.training.checkpoint import Checkpoint
from masktrain.training.foreign import ForeignWeights
from masktrain.training.recipe import Recipe

KEPT = "reference"
"""The group of a checkpoint that holds what the reference has and we do not use, under its names."""
_INPUT_NORM = "input_norm."
_HEADS = (("embed_dim", "heads"), ("decoder_embed_dim", "decoder_heads"))


@dataclass(frozen=True)
class Imported:
    """recipe: with the sizes and positions of the file. model: the weights under our names. kept: see the module.
    notes: what was decided or is worth knowing."""

    recipe: Recipe
    project: str
    model: dict[str, Tensor]
    kept: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """state: the tensors, contiguous and sharing no memory. key, prefix: see Project."""

    state: dict[str, Tensor]
    key: str | None
    prefix: str
    notes: tuple[str, ...]


# --- import ---


def known_project(recipe: str) -> Project:
    """Return the project of a recipe. Raises ConfigError where no published weights are known for it."""
    project = project_of(recipe)
    if project is None:
        known = ", ".join(name for project in PROJECTS for name in project.recipes)
        raise ConfigError(
            f"no names of a reference project are known for the recipe {recipe!r}; there are those of {known}."
        )
    return project


def fitting(
    recipes: Sequence[Recipe],
    weights: ForeignWeights,
    asked: Collection[str] = (),
    ignore: Collection[str] = (),
) -> tuple[Recipe, list[str]]:
    """Return the first of the recipes (one recipe in several sizes) that is as wide as the weights, or the very first,
    and the options of the command line that give its model the sizes of the weights.

    asked: dotted fields that are given beside. ignore: as in import_weights. Raises CheckpointError for weights of
    another project, ConfigError for a width that leaves the number of heads open.
    """
    project = known_project(recipes[0].name)
    state = {name: tensor for name, tensor in weights.state.items() if not _matches(name, ignore)}
    _check_project(project, recipes[0], state)
    if not any(field.startswith(("tokens.", "frontend.")) for field in asked):
        _check_patch(project, recipes[0], state)
    found = project.sizes(state)
    widths = [(width, heads) for width, heads in _HEADS if width in found and heads not in found]

    def agrees(recipe: Recipe) -> bool:
        return all(found[width] == getattr(recipe.model, width) for width, _ in widths)

    recipe = next(filter(agrees, recipes), recipes[0])
    for width, heads in widths:
        if found[width] != getattr(recipe.model, width) and f"model.{heads}" not in asked:
            raise ConfigError(
                f"the weights have {width} {found[width]}, and {recipe.name} of size {recipe.size} "
                f"{getattr(recipe.model, width)}. No weight tells the number of heads: set "
                f"--model.{heads.replace('_', '-')} (most ViTs have 64 channels a head, which would be "
                f"{max(1, found[width] // 64)})."
            )
    return recipe, [_option(name, value) for name, value in found.items() if f"model.{name}" not in asked]


def _option(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{flag}" if value else f"--model.no-{flag}"
    return f"--model.{flag}={value}"


def import_weights(
    recipe: Recipe,
    weights: ForeignWeights,
    *,
    asked: Collection[str] = (),
    allow_missing: Iterable[str] = (),
    ignore: Iterable[str] = (),
    statistics: Tensor | None = None,
) -> Imported:
    """Turn the weights of a reference project into those of a recipe.

    asked: dotted fields of the recipe that the user has set, which the file must agree with. allow_missing, ignore:
    the reference's names, or patterns of shell kind, that the file may lack (drawn as for a new run) and that are left
    out. statistics: (2, bins), for a recipe that normalises each mel bin. Raises CheckpointError or ConfigError.
    """
    project = known_project(recipe.name)
    notes: list[str] = []
    state = _without_ignored(weights, tuple(ignore), notes)
    _check_project(project, recipe, state)
    _check_patch(project, recipe, state)
    if state[project.patch_name].dim() == 2:
        tokens = recipe.tokens
        notes.append(
            f"tokens: {tokens.patch_freq} mel bins x {tokens.patch_time} frames, as the recipe {recipe.name} has them; "
            "the file does not tell them from others of as many values"
        )
    recipe = _with_sizes(project, recipe, state, asked)
    config, columns = project.positions(state, recipe.model, recipe.grid)
    recipe = _with_positions(recipe, config, columns, asked, notes)
    recipe = _with_statistics(project, recipe, state, asked, notes)
    model = _renamed(project, recipe, state, tuple(allow_missing), notes)
    model |= _input_norm(recipe, model, statistics)
    _check_values(model, notes)
    return Imported(recipe, project.name, model, _kept(project, recipe, state), tuple(notes))


def _without_ignored(
    weights: ForeignWeights, patterns: tuple[str, ...], notes: list[str]
) -> dict[str, Tensor]:
    names = (*weights.state, *weights.others)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"--ignore {pattern}: the file holds no such name.{nearest(pattern, names)}")
    wrong = [f"{n} is {what}" for n, what in weights.others.items() if not _matches(n, patterns)]
    if wrong:
        raise CheckpointError(
            f"weights: {len(wrong)} of the names hold no dense tensor: {_some(wrong)}. --ignore NAME leaves one out."
        )
    left_out = [name for name in names if _matches(name, patterns)]
    if left_out:
        notes.append(f"left out as asked: {_some(left_out)}")
    return {name: tensor for name, tensor in weights.state.items() if name not in left_out}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _some(texts: list[str], most: int = 20) -> str:
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more" if len(texts) > most else "")


def _check_project(project: Project, recipe: Recipe, state: Mapping[str, Tensor]) -> None:
    if project.fits(state):
        return
    likely = looks_like(state)
    has = [name for name in project.never if name in state]
    why = f"has {', '.join(has)}" if has else f"lacks {', '.join(n for n in project.marks if n not in state)}"
    known = [name for name in likely if project_of(name)]
    if known:
        advice = f"It looks like {' or '.join(known)}: take that for --as."
    elif likely:
        advice = f"It looks like {' or '.join(likely)}, which cannot be imported."
    else:
        advice = f"It looks like none of the known ones; its names begin {', '.join(list(state)[:5])}."
    raise CheckpointError(
        f"--as {recipe.name}: these are no weights of {project.name}: the file {why}. {advice}"
    )


def _check_patch(project: Project, recipe: Recipe, state: Mapping[str, Tensor]) -> None:
    """Compare the patch, which stands in the shape of its projection, before anything that follows from it."""
    shape = tuple(state[project.patch_name].shape)
    grid = recipe.grid
    others = [name for name in project.recipes if name != recipe.name]
    other = f" Or is it {' or '.join(others)}?" if others else ""
    if len(shape) == 2:
        if shape[1] != grid.patch_values:
            raise CheckpointError(
                f"--as {recipe.name}: the patches of the weights have {shape[1]} values, the recipe's {grid.patch_freq} x "
                f"{grid.patch_time}. Set --tokens.patch-freq and --tokens.patch-time.{other}"
            )
        return
    if len(shape) != 4 or shape[1] != 1:
        raise CheckpointError(
            f"weights: {project.patch_name} has shape {shape}, expected (width, 1, height, width of a patch)."
        )
    freq, time = (shape[3], shape[2]) if grid.order == "time" else (shape[2], shape[3])
    if (freq, time) != (grid.patch_freq, grid.patch_time):
        raise CheckpointError(
            f"--as {recipe.name}: the patches of the weights have {freq} mel bins x {time} frames, the recipe's "
            f"{grid.patch_freq} x {grid.patch_time}. Set --tokens.patch-freq {freq} --tokens.patch-time {time}.{other}"
        )


def _with_sizes(
    project: Project, recipe: Recipe, state: Mapping[str, Tensor], asked: Collection[str]
) -> Recipe:
    found = project.sizes(state)
    for name, value in found.items():
        _check_asked(f"model.{name}", value, getattr(recipe.model, name), asked)
    return replace(recipe, model=replace(recipe.model, **found))


def _check_asked(field: str, found: Any, value: Any, asked: Collection[str]) -> None:
    if field in asked and found != value:
        raise ConfigError(
            f"--{field.replace('_', '-')}: received {value}, and the weights have {found}. Leave it out."
        )


def _with_positions(
    recipe: Recipe, config: Any, columns: int | None, asked: Collection[str], notes: list[str]
) -> Recipe:
    for name in ("positions", "decoder_positions"):
        before, after = getattr(recipe.model, name, None), getattr(config, name, None)
        if before != after:
            _check_asked(f"model.{name}", after, before, asked)
            notes.append(f"model.{name}: {after}, as the table in the file; the recipe has {before}")
    recipe = replace(recipe, model=config)
    length = recipe.data.target_length
    if columns is None or (length is not None and recipe.grid.columns(length) == columns):
        return recipe
    frames = columns * recipe.grid.patch_time
    _check_asked("data.target_length", frames, length, asked)
    notes.append(
        f"data.target_length: {frames} frames, as the positions in the file; the recipe has {length}"
    )
    return replace(recipe, data=replace(recipe.data, target_length=frames))


def _with_statistics(
    project: Project, recipe: Recipe, state: Mapping[str, Tensor], asked: Collection[str], notes: list[str]
) -> Recipe:
    """Take mean and standard deviation of the log-mel from the file where it has them."""
    name = project.norm_name
    if name is None or name not in state or recipe.input_norm.kind != "global":
        return recipe
    values = state[name].double().flatten().tolist()
    if len(values) != 2 or not torch.isfinite(state[name]).all() or values[1] <= 0:
        raise CheckpointError(
            f"weights: {name} holds {values[:4]!s}; expected a mean and a standard deviation above 0. "
            f"--ignore {name} keeps those of the recipe."
        )
    norm = replace(recipe.input_norm, dataset_mean=values[0], dataset_std=values[1])
    for field in ("dataset_mean", "dataset_std"):
        _check_asked(f"input_norm.{field}", getattr(norm, field), getattr(recipe.input_norm, field), asked)
    notes.append(
        f"input_norm: mean {values[0]:.6g}, standard deviation {values[1]:.6g}, from {name} in the file"
    )
    return replace(recipe, input_norm=norm)


def _renamed(
    project: Project,
    recipe: Recipe,
    state: dict[str, Tensor],
    allowed: tuple[str, ...],
    notes: list[str],
) -> dict[str, Tensor]:
    """Return the weights under our names; those of the input norm may lack their values (device meta)."""
    with torch.device("meta"):
        ours = registry.build(recipe.model, recipe.grid, recipe.input_norm).state_dict()
    theirs = project.export(ours, recipe.grid)
    for pattern in allowed:
        if not any(fnmatchcase(name, pattern) for name in theirs):
            raise ConfigError(
                f"--allow-missing {pattern}: {project.name} has no such name.{nearest(pattern, theirs)}"
            )
    wrong = [f"{n} is {t.dtype}" for n, t in state.items() if n in theirs and not t.is_floating_point()]
    if wrong:
        raise CheckpointError(f"weights: expected floating-point numbers: {_some(wrong)}.")
    missing = {
        name: tensor for name, tensor in theirs.items() if name not in state and _matches(name, allowed)
    }
    out = project.rename({**missing, **state}, ours, recipe.grid)
    if missing:
        # only now, when all else fits, is memory taken for a whole model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
        new = project.export(model.state_dict(), recipe.grid)
        out = project.rename({**{name: new[name] for name in missing}, **state}, ours, recipe.grid)
        notes.append(f"drawn anew, as they are missing: {_some(list(missing))}")
    other = {str(state[n].dtype).removeprefix("torch.") for n in theirs if n in state} - {"float32"}
    if other:
        notes.append(f"stored as {' and '.join(sorted(other))} in the file: float32 here")
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _input_norm(recipe: Recipe, model: Mapping[str, Tensor], statistics: Tensor | None) -> dict[str, Tensor]:
    """Return the state of the input norm that no reference's weights hold."""
    bins = recipe.frontend.n_mels
    norm = InputNorm(recipe.input_norm, bins)
    if recipe.input_norm.kind == "per_bin":
        if statistics is None:
            raise ConfigError(
                f"the recipe {recipe.name} normalises each mel bin, and the weights do not hold how. Give --statistics "
                "FILE.npy (MaskSpec's mean_std_128.npy), or --input-norm.kind global with --input-norm.dataset-mean "
                "and --input-norm.dataset-std."
            )
        if statistics.shape[1] != bins:
            raise ConfigError(
                f"--statistics: holds {statistics.shape[1]} mel bins; the front end has {bins}."
            )
        norm.set_bins(*statistics)
    elif statistics is not None:
        raise ConfigError(
            f"--statistics: of no use to an input norm of kind {recipe.input_norm.kind!r}; it is for 'per_bin'."
        )
    fresh = {f"{_INPUT_NORM}{name}": tensor for name, tensor in norm.state_dict().items()}
    return {name: tensor for name, tensor in fresh.items() if model[name].is_meta}


def _check_values(model: Mapping[str, Tensor], notes: list[str]) -> None:
    bad = [name for name, tensor in model.items() if not torch.isfinite(tensor).all()]
    if bad:
        notes.append(f"warning: NaN or infinity in {len(bad)} of {len(model)} tensors: {_some(bad, 5)}")


def _kept(project: Project, recipe: Recipe, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `reference_state` would not write as the file has it."""
    unused = {name: state[name] for name in project.ignored if name in state}
    if not unused:
        return {}
    usual = _usual(project, recipe, None)
    return {
        name: tensor
        for name, tensor in unused.items()
        if name not in usual or not _same_bits(usual[name], tensor)
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


# --- export ---


def find_checkpoint(path: Path) -> tuple[Checkpoint, Recipe]:
    """Return the newest valid checkpoint of a run folder, or the one in a checkpoint folder, and its recipe.

    Raises CheckpointError.
    """
    if os.path.isdir(path / "checkpoints"):
        found = checkpoint.latest(path / "checkpoints")
        if found.checkpoint is None:
            raise CheckpointError(f"{path}: holds no valid checkpoint. {' '.join(found.damaged)}")
        saved = found.checkpoint
    elif os.path.isdir(path):
        saved = checkpoint.load(path)
    else:
        raise CheckpointError(f"{path}: no such folder; name a run or one of its checkpoints.")
    try:
        return saved, from_dict(Recipe, saved.data["recipe_config"], "recipe")
    except (KeyError, TypeError, OverflowError, ConfigError) as error:
        raise CheckpointError(f"{path}: does not say what it was trained on ({error}).") from error


def reference_state(saved: Checkpoint, recipe: Recipe, columns: int | None = None) -> Exported:
    """Return the weights under the names and in the shapes of the reference project, with all that a strict load in
    its own model needs.

    columns: time columns of the position tables; None: those of data.target_length. Raises CheckpointError or
    ConfigError.
    """
    project = known_project(recipe.name)
    _check_fits(saved, recipe)
    try:
        learned = project.export(saved.tensors["model"], recipe.grid)
    except KeyError as error:
        raise CheckpointError(
            f"{saved.path}: {error} has no counterpart in {project.name}; was the recipe changed there?"
        ) from error
    kept = saved.tensors.get(KEPT, {}) if columns is None else {}
    kept = {name: tensor for name, tensor in kept.items() if name in project.ignored}
    state = {**_usual(project, recipe, columns), **kept, **learned}
    norm = recipe.input_norm
    what = "" if norm.dataset_mean is None else f", mean {norm.dataset_mean:.6g}, std {norm.dataset_std:.6g}"
    notes = (f"input norm, which the state dict does not hold: {norm.kind}{what}, factor {norm.factor:g}",)
    return Exported(
        {name: tensor.clone().contiguous() for name, tensor in state.items()},
        project.key,
        project.prefix,
        notes if norm.kind != "batch" else (),
    )


def timm_state(saved: Checkpoint, recipe: Recipe, columns: int | None = None) -> Exported:
    """Return the encoder under the names of timm's VisionTransformer (a distilled one for SSAST).

    Raises CheckpointError, also for a model that timm has none of.
    """
    project = known_project(recipe.name)
    if project.timm is None:
        raise CheckpointError(f"--as timm: {recipe.name} is no ViT of timm's: {project.no_timm}.")
    reference = reference_state(saved, recipe, columns)
    state = project.timm(reference.state)
    grid = recipe.grid
    height, width = grid.freq * grid.patch_freq, _columns(recipe, columns) * grid.patch_time
    patch = (grid.patch_freq, grid.patch_time)
    if grid.order == "time":
        height, width, patch = width, height, patch[::-1]
    model = recipe.model
    leading = "" if "cls_token" in state else ", class_token=False, global_pool='avg', fc_norm=False"
    how = (
        f"VisionTransformer{'Distilled' if 'dist_token' in state else ''}(img_size=({height}, {width}), "
        f"patch_size={patch}, in_chans=1, num_classes=0, embed_dim={model.embed_dim}, depth={model.encoder_layers}, "
        f"num_heads={model.heads}, mlp_ratio={model.ffn_dim / model.embed_dim:g}{leading})"
    )
    axes = "time x mel" if grid.order == "time" else "mel x time"
    return Exported(state, None, "", (f"timm: {how}; its input is (batch, 1, {axes})", *reference.notes))


def _check_fits(saved: Checkpoint, recipe: Recipe) -> None:
    """Raise CheckpointError where the tensors are not those of the recipe's model."""
    with torch.device("meta"):
        model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    own = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    given = {name: (tensor.shape, tensor.dtype) for name, tensor in saved.tensors.get("model", {}).items()}
    wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
    if wrong:
        raise CheckpointError(
            f"{saved.path}: its weights are not those of its recipe: {_some([ascii(n) for n in wrong], 10)}."
        )


def _columns(recipe: Recipe, columns: int | None) -> int:
    learned: int | None = getattr(recipe.model, "columns", None)
    if learned is not None:
        if columns not in (None, learned):
            raise ConfigError(f"--columns: the learned positions have {learned} columns; received {columns}.")
        return learned
    if columns is not None:
        return columns
    if recipe.data.target_length is None:
        raise ConfigError(
            f"data.target_length: {recipe.name} was trained without one, so the length of its position tables is open. "
            "Give --columns N."
        )
    return max(1, recipe.grid.columns(recipe.data.target_length))


def _usual(project: Project, recipe: Recipe, columns: int | None) -> dict[str, Tensor]:
    """Return what the reference has beside the learned weights, as it has it in a new model."""
    out = project.fixed(recipe.model, recipe.grid, _columns(recipe, columns))
    norm = recipe.input_norm
    if project.norm_name is not None and norm.kind == "global":
        out[project.norm_name] = torch.tensor([norm.dataset_mean, norm.dataset_std])
    return out
