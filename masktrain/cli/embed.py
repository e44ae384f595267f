# SPDX-License-Identifier: Apache-2.0
"""`masktrain embed`: clip and frame embeddings of audio files, as one .npz."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from masktrain.cli.options import parse, write_json
from masktrain.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Write the embeddings of audio files of any length: `clips` (C, D), and packed `frames` (T, D) with `cu_frames` (C+1)
    and `timestamps_ms` (T), the middle of each frame, beside the `paths`. Files longer than what the encoder was trained on
    are embedded in windows."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Audio files, folders or manifests."""
    checkpoint: Path | None = None
    """A run folder (its newest checkpoint) or a checkpoint folder."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("embeddings.npz")
    """The .npz to write."""
    layer: int | None = None
    """Encoder layer, counted from 1; default the last."""
    pool: Literal["concat", "mean"] = "concat"
    """How the patches of a time column become one frame: one after another from low to high frequency, or their mean."""
    batch_size: int = 8
    """Files that are embedded together; it changes no number."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: Path | None = None
    """Also write a report there."""


def main(arguments: list[str]) -> None:
    """Run `masktrain embed`."""
    options = parse(Options, "embed", arguments)
    if not options.paths:
        raise ConfigError("embed: no audio was given. Name files, folders or manifests.")
    if options.checkpoint is None:
        raise ConfigError("embed: --checkpoint is missing. Name a run folder or one of its checkpoints.")
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size: must be at least 1; received {options.batch_size}.")
    out = options.out.absolute()
    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}: expected a name ending in .npz.")
    if os.path.lexists(out):
        raise ConfigError(f"--out {out}: exists already, and nothing is overwritten. Name another file (-o).")
    if not out.parent.is_dir():
        raise ConfigError(f"--out {out}: its folder does not exist. Name a file in one that does (-o).")
    from masktrain.data.manifest import shown
    from masktrain.evaluation.embeddings import embed_files, write_npz
    from masktrain.evaluation.encoder import load_encoder
    from masktrain.training.console import Console
    from masktrain.training.corpus import log_lines, read_clips
    from masktrain.training.distributed import pick_device

    encoder = load_encoder(options.checkpoint, pick_device(options.device))
    layer = encoder.n_layers if options.layer is None else options.layer
    if not 1 <= layer <= encoder.n_layers:
        raise ConfigError(
            f"--layer: {encoder.name} has the layers 1 to {encoder.n_layers}; received {layer}."
        )
    with Console() as console, log_lines(console):
        manifest, bad = read_clips(options.paths, console)
        with console.progress("embedding") as advance:
            found = embed_files(
                encoder,
                manifest,
                layer,
                pool=options.pool,
                batch_size=options.batch_size,
                progress=advance,
            )
        write_npz(out, found, encoder, layer)
        frames, values = found.frames.shape
        console.finish(
            [
                ("encoder", f"{encoder.name}, layer {layer} of {encoder.n_layers}"),
                ("embedded", f"{len(found.paths)} files, {frames} frames of {values} values"),
                ("written", shown(out)),
            ]
        )
    report = {
        "out": str(out),
        "checkpoint": str(options.checkpoint),
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        "layer": layer,
        "pool": options.pool,
        "files": len(found.paths),
        "frames": frames,
        "values": values,
        "bad_clips": [str(clip) for clip in bad],
    }
    write_json(options.json, report)
