# SPDX-License-Identifier: Apache-2.0
"""`masktrain export`: a checkpoint's weights under the names of the reference project, the encoder as timm's ViT, or a
wrapper of it for EVAR."""

from __future__ import annotations

import io
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from masktrain.cli.options import parse, write_json
from masktrain.errors import ConfigError, RunError

if TYPE_CHECKING:
    from masktrain.training.weights import Exported

SUFFIXES = (".safetensors", ".pth", ".pt")


@dataclass(frozen=True)
class Options:
    """Write the weights of a run or of one checkpoint as the reference project names them, position tables included,
    the encoder alone as timm's VisionTransformer does, or the wrapper file and config with which EVAR evaluates it."""

    checkpoints: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """A run folder (its newest checkpoint) or a checkpoint folder."""
    form: Annotated[Literal["reference", "timm", "evar"] | None, tyro.conf.arg(aliases=["--as"])] = None
    """reference: all weights, for a strict load in the reference's own model; timm: the encoder; evar: a wrapper and a
    config for nttcslab/eval-audio-repr."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The file to write, .safetensors, or .pth with the layout of the reference; default RECIPE_FORM.safetensors. For
    evar a new folder, default RECIPE_evar."""
    columns: int | None = None
    """Time columns of the fixed position tables; default those of data.target_length."""
    json: Path | None = None
    """Also write the report there."""


def main(arguments: list[str]) -> None:
    """Run `masktrain export`."""
    options = parse(Options, "export", arguments)
    if len(options.checkpoints) != 1:
        raise ConfigError(f"export: expected one run or checkpoint; received {len(options.checkpoints)}.")
    if options.form is None:
        raise ConfigError("export: --as is missing. Allowed: reference, timm, evar.")
    if options.columns is not None and not 1 <= options.columns <= 100_000:
        raise ConfigError(f"--columns: must lie in [1, 100000]; received {options.columns}.")
    if options.form == "evar":
        _evar(options)
        return
    from masktrain.training.console import Console
    from masktrain.training.weights import find_checkpoint, reference_state, timm_state

    saved, recipe = find_checkpoint(options.checkpoints[0])
    out = (options.out or Path(f"{recipe.name}_{options.form}.safetensors")).absolute()
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: expected a name ending in {', '.join(SUFFIXES)}.")
    if os.path.lexists(out):
        raise ConfigError(f"--out {out}: exists already, and nothing is overwritten. Name another file (-o).")
    exported = (reference_state if options.form == "reference" else timm_state)(
        saved, recipe, options.columns
    )
    _write(exported, out)
    values = sum(tensor.numel() for tensor in exported.state.values())
    with Console() as console:
        for note in exported.notes:
            console.note(note)
        console.finish([("written", f"{out}: {len(exported.state)} tensors, {values / 1e6:.1f} M values")])
    report = {"out": str(out), "recipe": recipe.name, "step": saved.step, "form": options.form}
    shapes = {name: list(tensor.shape) for name, tensor in exported.state.items()}
    write_json(options.json, {**report, "shapes": shapes, "notes": list(exported.notes)})


def _evar(options: Options) -> None:
    """Write EVAR's wrapper and config."""
    if options.columns is not None:
        raise ConfigError(
            "--columns: of no use with --as evar, which exports no position table. Leave it out."
        )
    from masktrain.evaluation.encoder import load_encoder
    from masktrain.evaluation.evar_wrapper import wrapper_files, write_wrapper
    from masktrain.training.console import Console

    (checkpoint,) = options.checkpoints
    encoder = load_encoder(checkpoint, "cpu")
    out = (options.out or Path(f"{encoder.recipe.name}_evar")).absolute()
    if os.path.lexists(out):
        raise ConfigError(
            f"--out {out}: exists already, and nothing is overwritten. Name another folder (-o)."
        )
    files = wrapper_files(encoder, checkpoint)
    write_wrapper(out, files)
    with Console() as console:
        console.finish([("written", f"{out}: {', '.join(files)}"), ("encoder", encoder.name)])
    report = {"out": str(out), "recipe": encoder.recipe.name, "step": encoder.step, "form": options.form}
    write_json(options.json, {**report, "files": sorted(files)})


def _write(exported: Exported, out: Path) -> None:
    """Write the file, whole or not at all."""
    import torch

    from masktrain.training import storage

    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        if out.suffix == ".safetensors":
            storage.write_tensors(temporary, exported.state)
        else:
            # through memory: torch turns the system's errors into others
            buffer = io.BytesIO()
            state = {f"{exported.prefix}{name}": tensor for name, tensor in exported.state.items()}
            content: dict[str, Any] = state if exported.key is None else {exported.key: state}
            torch.save(content, buffer)
            storage.write(temporary, buffer.getvalue())
        os.replace(temporary, out)
        storage.sync(out.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(
            f"--out {out}: cannot be written ({error.strerror or error}). Name a file in a folder that can be (-o)."
        ) from error
