# SPDX-License-Identifier: Apache-2.0
"""`masktrain run`: pretrain a recipe, or continue an interrupted run."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from masktrain.cli.options import override, parse_known
from masktrain.config import differences
from masktrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from masktrain.training.recipe import Recipe
    from masktrain.training.run_spec import ProbeSpec, RunSpec

# Without data and without a GPU: about two minutes on two cores. With a GPU the demo corpus is soon learned as well.
DEMO_STEPS = {"cpu": 160, "cuda": 1000}
# far above any use, and far below what would fill the memory before the first step
MOST = {"steps": 10**9, "batch_size": 10**6, "checkpoint_every": 10**9, "probe_every": 10**9}
# options that are short for a field of the recipe
SHORT_FOR = {"loader": "data", "precision": "train", "checkpoint_every": "train"}


@dataclass(frozen=True)
class Options:
    """Pretrain a recipe.

    Any field of the recipe is an option as well, by its dotted name: --masking.mask-ratio 0.8. `masktrain recipes
    show NAME` lists them with their values. Without --data, a small demo corpus is made and trained on.
    """

    recipe: str | None = None
    """What to train; `masktrain recipes list` shows all."""
    data: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A folder, an audio file or a manifest (CSV, TSV, AST JSON, M2D CSV, fairseq TSV); may be repeated."""
    out: Path | None = None
    """Folder of the run; default runs/RECIPE_DATE-TIME."""
    steps: int | None = None
    """Optimiser steps; every horizon of the recipe scales with it. Default: as published."""
    minutes: float | None = None
    """Run length as time instead: a few steps are measured first, then the number of steps is fixed."""
    batch_size: int | None = None
    """Clips of one step over all GPUs and micro-batches."""
    size: Literal["tiny", "small", "base"] | None = None
    """Named size of model, batch and learning rate."""
    masking: str | None = None
    """Another masking strategy on this recipe, with the share of masked tokens of the recipe where it has one: random,
    frame, chunk, time, frequency, time_frequency, inverse_block, dispersion, self_guided, patch_drop. The fields of the
    strategy are options as well: --masking.rule s1_code, --masking.hint.gamma 4."""
    loader: Literal["auto", "dali", "soundfile"] | None = None
    """What decodes the audio."""
    device: str | None = None
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """Number format of the matrix products."""
    seed: int | None = None
    """Seed of every random choice."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    probe_data: Path | None = None
    """Labelled clips with folds or splits (CSV): what the features tell of their classes is shown during the run."""
    probe_label: str | None = None
    """Column of the labels of --probe-data; default: the one that looks like it."""
    probe_every: int | None = None
    """Steps between two readings of the probe; default a tenth of the run."""
    probe: Literal["knn", "linear", "off"] | None = None
    """What classifies them: nearest neighbours (the default) or a linear classifier. It never selects a checkpoint. off,
    with --resume, goes on without."""
    resume: Path | None = None
    """Continue the run in this folder: the same run, nothing else may differ."""
    init_from: Path | None = None
    """Start from the weights of this checkpoint (weights only)."""
    json: Path | None = None
    """Also write the summary there."""


def main(arguments: list[str]) -> None:
    """Run `masktrain run`."""
    options, rest = parse_known(Options, "run", arguments)
    if options.steps is not None and options.minutes is not None:
        raise ConfigError("--steps and --minutes: give one of them, not both.")
    if options.minutes is not None and not 0 < options.minutes < 1e6:
        raise ConfigError(f"--minutes: must be above 0; received {options.minutes}.")
    for name, most in MOST.items():
        value = getattr(options, name)
        if value is not None and not 1 <= value <= most:
            bound = "at least 1" if value < 1 else f"at most {most}"
            raise ConfigError(f"--{name.replace('_', '-')}: must be {bound}; received {value}.")

    from masktrain.training.trainer import train

    spec = _resumed(options, rest) if options.resume else _fresh(options, rest)
    monitor = None
    if spec.probe is not None:
        from masktrain.evaluation.monitor import probe_monitor

        monitor = probe_monitor(spec.probe)
    train(spec, options.json, monitor)


def _fresh(options: Options, rest: list[str]) -> RunSpec:
    from masktrain.recipes import find
    from masktrain.training.distributed import pick_device
    from masktrain.training.run_dir import default_out
    from masktrain.training.run_spec import RunSpec

    if options.recipe is None:
        raise ConfigError("--recipe is missing. `masktrain recipes list` shows what can be trained.")
    device = pick_device(options.device or "auto")
    demo = not options.data
    notes = []
    size = options.size
    if size is None and demo and device.type == "cpu":
        size = "tiny"
        notes.append("size tiny: no CUDA device was found or asked for")
    recipe = _adjusted(find(options.recipe, size or "base"), options, rest)
    if options.steps is None and options.minutes is None and demo:
        steps = DEMO_STEPS[device.type]
        recipe = replace(recipe, train=replace(recipe.train, steps=steps))
        notes.append(f"{steps} steps: a short run, since there is no --data; --steps sets another length")
    manifests = tuple(path.absolute() for path in options.data)
    for path in manifests:
        if not os.path.exists(path):
            raise DataError(f"--data {path}: no such file or folder.")
    return RunSpec(
        recipe=recipe,
        data=manifests,
        out=(options.out or default_out(recipe.name, datetime.now())).absolute(),
        device=options.device or "auto",
        minutes=options.minutes,
        init_from=options.init_from.absolute() if options.init_from else None,
        resume=False,
        notes=tuple(notes),
        probe=_probe(options),
    )


def _probe(options: Options) -> ProbeSpec | None:
    from masktrain.training.run_spec import ProbeSpec

    if options.probe_data is None:
        for name in ("probe_label", "probe_every", "probe"):
            if getattr(options, name) not in (None, "off"):
                raise ConfigError(
                    f"--{name.replace('_', '-')}: says how --probe-data is read; name that too."
                )
        return None
    if options.probe == "off":
        raise ConfigError("--probe off: reads no --probe-data; leave one of them out.")
    data = options.probe_data.absolute()
    return ProbeSpec(data, options.probe_label, options.probe_every, options.probe or "knn")


def _adjusted(recipe: Recipe, options: Options, rest: list[str]) -> Recipe:
    """Apply the masking strategy, whose fields may be overridden, the dotted overrides, then the named options."""
    from masktrain.masking.registry import strategy
    from masktrain.training import masking_fit
    from masktrain.training.run_spec import check_numbers

    if options.masking is not None and options.masking != type(recipe.masking).name:
        recipe = masking_fit.put(recipe, strategy(options.masking))
    for name, group in SHORT_FOR.items():
        short, long = (f"--{part}{name.replace('_', '-')}" for part in ("", f"{group}."))
        if getattr(options, name) is not None and any(a.replace("_", "-").startswith(long) for a in rest):
            raise ConfigError(f"{short} and {long}: the same under two names; give one of them.")
    recipe = override(recipe, "run", rest, Options)
    check_numbers(recipe)
    if options.batch_size is not None:
        recipe = replace(recipe, batch_size=options.batch_size)
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    if options.loader is not None:
        recipe = replace(recipe, data=replace(recipe.data, loader=options.loader))
    train = recipe.train
    if options.steps is not None:
        train = replace(train, steps=options.steps)
    if options.precision is not None:
        train = replace(train, precision=options.precision)
    if options.checkpoint_every is not None:
        train = replace(train, checkpoint_every=options.checkpoint_every)
    return replace(recipe, train=train)


def _resumed(options: Options, rest: list[str]) -> RunSpec:
    """Return the stored run; whatever was given beside --resume must agree with it."""
    from masktrain.training.run_spec import read_spec, same_run

    assert options.resume is not None
    stored = read_spec(options.resume.absolute())
    clashes: list[tuple[str, Any, Any]] = []
    given = {f.name for f in fields(options) if getattr(options, f.name) not in (None, ())} - {
        "resume",
        "json",
    }
    probe = stored.probe
    asked: dict[str, tuple[Any, Any]] = {
        "recipe": (stored.recipe.name, options.recipe),
        "size": (stored.recipe.size, options.size),
        "data": (tuple(map(str, stored.data)), tuple(str(p.absolute()) for p in options.data)),
        "out": (str(stored.out), str(options.out.absolute()) if options.out else None),
        "device": (stored.device, options.device),
        "init_from": (str(stored.init_from), str(options.init_from)),
        "probe_data": (probe and probe.data, options.probe_data and options.probe_data.absolute()),
        "probe_label": (probe and probe.label, options.probe_label),
        "probe_every": (probe and probe.every, options.probe_every),
    }
    if options.probe != "off":
        asked["probe"] = (probe and probe.kind, options.probe)
    for name, (old, new) in asked.items():
        if name in given and old != new:
            clashes.append((name, old, new))
    if options.minutes is not None:
        clashes.append(("minutes", f"{stored.recipe.train.steps} steps", options.minutes))
    adjusted = _adjusted(stored.recipe, options, rest)
    clashes += [d for d in differences(stored.recipe, adjusted) if not same_run(d[0])]
    if clashes:
        listed = "; ".join(f"{name}: the run has {old}, received {new}" for name, old, new in clashes)
        raise ConfigError(
            f"--resume {options.resume}: nothing else may differ from the run. {listed}. "
            "Leave these options out, or start a new run with --out (and --init-from for its weights)."
        )
    return replace(stored, recipe=adjusted, probe=None if options.probe == "off" else probe)
