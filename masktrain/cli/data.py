# SPDX-License-Identifier: Apache-2.0
"""`masktrain data`: index audio into the canonical manifest, measure normalisation statistics, make the demo corpus."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from masktrain.cli.options import parse, write_json
from masktrain.errors import ConfigError, nearest

ACTIONS = ("index", "stats", "demo")
USAGE = """usage: masktrain data index PATH [PATH ...] -o clips.tsv    write the canonical manifest
       masktrain data stats PATH [PATH ...] [--frontend mae_ast]   measure dataset_mean and dataset_std
       masktrain data demo -o FOLDER                       make the demo corpus
"""


@dataclass(frozen=True)
class IndexOptions:
    """Read the headers of all clips and write the canonical manifest, which later runs read at once."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders, audio files or manifests."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The manifest to write."""
    json: Path | None = None
    """Also write the report there."""


@dataclass(frozen=True)
class StatsOptions:
    """Measure mean and standard deviation of the log-mel of a data set, global and for each mel bin."""

    paths: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders, audio files or manifests."""
    frontend: str = "mae_ast"
    """Front-end preset."""
    clips: int | None = None
    """Measure this many clips drawn at random; default all."""
    clip_seconds: float | None = 10.0
    """Longer files are cut to this at a random place, as a run cuts them; none takes whole files."""
    seed: int = 0
    """Seed of the draw and of the cuts."""
    json: Path | None = None
    """Also write the statistics there, with those of each bin."""


@dataclass(frozen=True)
class DemoOptions:
    """Make the small labelled demo corpus: FLAC, WAV and Ogg files of several sample rates and lengths."""

    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The folder to make."""
    seed: int = 0
    """Seed of the synthesiser."""
    json: Path | None = None
    """Also write the report there."""


def main(arguments: list[str]) -> None:
    """Run `masktrain data ACTION`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    action, rest = arguments[0], arguments[1:]
    if action not in ACTIONS:
        raise ConfigError(
            f"data: no action {action!r}.{nearest(action, ACTIONS)} Allowed: {', '.join(ACTIONS)}."
        )
    {"index": _index, "stats": _stats, "demo": _demo}[action](rest)


def _check(paths: tuple[Path, ...], seed: int = 0) -> None:
    if not paths:
        raise ConfigError("data: no path was given. Name folders, audio files or manifests.")
    if not 0 <= seed < 1 << 48:
        raise ConfigError(f"--seed: must lie in [0, 2^48); received {seed}.")


def _index(rest: list[str]) -> None:
    from masktrain.data.manifest import shown, write_canonical
    from masktrain.training.console import Console
    from masktrain.training.corpus import read_clips

    options = parse(IndexOptions, "data index", rest)
    _check(options.paths)
    with Console() as console:
        manifest, bad = read_clips(options.paths, console)
        write_canonical(manifest, options.out)
        console.note(f"{shown(options.out)}: {len(manifest)} clips, {manifest.seconds / 3600:.2f} h")
    report = {"manifest": str(options.out), "clips": len(manifest), "seconds": manifest.seconds}
    write_json(options.json, report | {"bad_clips": [asdict(clip) for clip in bad]})


def _stats(rest: list[str]) -> None:
    from masktrain.frontend.presets import preset
    from masktrain.training.console import Console
    from masktrain.training.corpus import read_clips
    from masktrain.training.statistics import measure_statistics

    options = parse(StatsOptions, "data stats", rest)
    _check(options.paths, options.seed)
    frontend = preset(options.frontend)
    with Console() as console:
        manifest, bad = read_clips(options.paths, console)
        with console.progress("measuring") as advance:
            measured = measure_statistics(
                manifest,
                frontend,
                clips=options.clips,
                clip_seconds=options.clip_seconds,
                seed=options.seed,
                progress=advance,
            )
        found, warning = measured.statistics, measured.statistics.warning()
        for clip in measured.bad:
            console.warn(f"bad clip left out: {clip}")
        if warning:
            console.warn(warning)
        more = "" if options.json else "; --json PATH writes each bin's"
        console.finish(
            [
                ("front end", frontend.preset),
                ("measured", f"{measured.clips} clips, {found.frames} frames"),
                ("dataset_mean", f"{found.dataset_mean:.6f}"),
                ("dataset_std", f"{found.dataset_std:.6f}"),
                ("per bin", f"std {min(found.bin_std):.4f} to {max(found.bin_std):.4f}{more}"),
            ]
        )
    report = {"frontend": frontend.preset, "clips": measured.clips, **asdict(found), "warning": warning}
    write_json(options.json, report | {"bad_clips": [asdict(clip) for clip in [*bad, *measured.bad]]})


def _demo(rest: list[str]) -> None:
    from masktrain.data.demo import make_demo
    from masktrain.data.manifest import shown
    from masktrain.training.console import Console

    options = parse(DemoOptions, "data demo", rest)
    _check((options.out,), options.seed)
    path = make_demo(options.out, options.seed)
    Console().note(f"{shown(path)}: the demo corpus; train on it with --data {shown(path)}")
    write_json(options.json, {"manifest": str(path)})
