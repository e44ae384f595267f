# SPDX-License-Identifier: Apache-2.0
"""`masktrain data`: index audio into the canonical manifest, measure normalisation statistics, make the demo corpus."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro
from rich.progress import Progress

from masktrain.cli.options import parse, write_json
from masktrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from masktrain.data.manifest import Manifest

ACTIONS = ("index", "stats", "demo")
USAGE = """usage: masktrain data index PATH [PATH ...] -o clips.tsv    write the canonical manifest
       masktrain data stats PATH [PATH ...] [--frontend mae_ast]   measure dataset_mean and dataset_std
       masktrain data demo -o FOLDER                       make the demo corpus
"""


class Advance(Protocol):
    """Called with how many of how many are done."""

    def __call__(self, done: int, total: int) -> None: ...


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
    seed: int = 0
    """Seed of the draw."""
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
        raise ConfigError(f"data: no action {action!r}.{nearest(action, ACTIONS)} Allowed: {', '.join(ACTIONS)}.")
    {"index": _index, "stats": _stats, "demo": _demo}[action](rest)


@contextmanager
def progress_bar(label: str) -> Iterator[Advance]:
    """Show progress on a terminal, nothing elsewhere."""
    with Progress(disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(label, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


def read_manifest(paths: Sequence[Path]) -> Manifest:
    """Return the clips of what the user named, indexed, after saying what was left out."""
    from masktrain.data.index import index_manifest
    from masktrain.data.readers import load_manifest

    entries, notes = load_manifest(paths)
    for note in notes:
        print(f"note: {note.text}")
    with progress_bar("reading headers") as advance:
        manifest, bad = index_manifest(entries, progress=advance)
    for clip in bad:
        print(f"bad clip left out: {clip}")
    return manifest


def _index(rest: list[str]) -> None:
    from masktrain.data.manifest import write_canonical

    options = parse(IndexOptions, "data index", rest)
    manifest = read_manifest(options.paths)
    write_canonical(manifest, options.out)
    print(f"{options.out}: {len(manifest)} clips, {manifest.seconds / 3600:.2f} h")
    write_json(options.json, {"manifest": str(options.out), "clips": len(manifest), "seconds": manifest.seconds})


def _stats(rest: list[str]) -> None:
    from masktrain.training.corpus import measure_statistics

    options = parse(StatsOptions, "data stats", rest)
    manifest = read_manifest(options.paths)
    with progress_bar("measuring") as advance:
        report: dict[str, Any] = measure_statistics(
            manifest, options.frontend, clips=options.clips, seed=options.seed, progress=advance
        )
    print(f"front end {options.frontend}, {report['clips']} clips, {report['frames']} frames")
    print(f"dataset_mean {report['dataset_mean']:.6f}")
    print(f"dataset_std  {report['dataset_std']:.6f}")
    stds = report["std_per_bin"]
    print(f"per bin: std {min(stds):.4f} to {max(stds):.4f}" + ("" if options.json else " (--json PATH writes them)"))
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    write_json(options.json, report)


def _demo(rest: list[str]) -> None:
    from masktrain.data.demo import make_demo

    options = parse(DemoOptions, "data demo", rest)
    path = make_demo(options.out, options.seed)
    print(f"{path}: the demo corpus; train on it with --data {path}")
    write_json(options.json, {"manifest": str(path)})
