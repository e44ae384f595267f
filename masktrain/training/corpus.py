# SPDX-License-Identifier: Apache-2.0
"""The clips of a run: the demo corpus or what the user named, indexed, and what is held out of training."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from masktrain.data.demo import make_demo
from masktrain.data.index import index_manifest
from masktrain.data.manifest import BadClip, Manifest
from masktrain.data.order import order
from masktrain.data.readers import load_manifest
from masktrain.errors import ConfigError
from masktrain.training.console import Console
from masktrain.training.distributed import World
from masktrain.training.recipe import Recipe

# an epoch that no run reaches: keeps the draw of held-out clips apart from the training order
HOLDOUT_EPOCH = 0xFFFFFFFF
MOST_NAMED = 10


def demo_folder() -> Path:
    """Return where the demo corpus is kept: the user's cache, or a temporary folder where that cannot be written."""
    try:
        named = os.environ.get("XDG_CACHE_HOME", "")
        # a relative one is to be ignored (XDG base directory specification)
        cache = Path(named if os.path.isabs(named) else Path.home() / ".cache") / "masktrain"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache / "demo"
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return Path(tempfile.gettempdir()) / f"masktrain-demo-{os.getuid()}"


def read_corpus(data: tuple[Path, ...], world: World, console: Console) -> tuple[Manifest, list[BadClip]]:
    """Return the clips of `data`, or of the demo corpus where none is named, and those that cannot be used.

    Raises DataError.
    """
    if not data:
        folder = demo_folder()
        if world.first:
            console.note(f"No --data: training on the demo corpus of synthetic sounds in {folder}.")
            make_demo(folder)
        world.barrier()
        data = (make_demo(folder),)
    return read_clips(data, console)


def read_clips(data: Sequence[Path], console: Console) -> tuple[Manifest, list[BadClip]]:
    """Return the clips that the user named, indexed, and those that cannot be used, after saying so. Raises DataError."""
    entries, notes = load_manifest(data)
    with console.progress("reading headers") as advance:
        manifest, bad = index_manifest(entries, progress=advance, notes=notes)
    for note in notes:
        console.note(note.text)
    if bad:
        named = "; ".join(str(clip) for clip in bad[:MOST_NAMED])
        more = f"; and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
        console.warn(f"{len(bad)} of {len(entries)} clips cannot be used and are left out: {named}{more}")
    return manifest, bad


def split(manifest: Manifest, recipe: Recipe) -> tuple[Manifest, Manifest]:
    """Return the clips trained on and the clips held out, each in manifest order.

    The held-out ones are the first of a permutation that depends on the seed and the number of clips only.
    """
    clips = len(manifest)
    wanted = recipe.train.validation_clips
    if wanted is None:
        wanted = 0 if clips < 20 else min(256, max(4, clips // 50))
    if wanted >= clips:
        raise ConfigError(
            f"train.validation_clips: {wanted} of {clips} clips would leave none to train on; lower it."
        )
    held_out = np.zeros(clips, dtype=bool)
    held_out[order(recipe.seed, HOLDOUT_EPOCH, clips)[:wanted]] = True
    return subset(manifest, np.flatnonzero(~held_out)), subset(manifest, np.flatnonzero(held_out))


def subset(manifest: Manifest, rows: NDArray[np.int64]) -> Manifest:
    """Return the manifest of these rows."""
    return Manifest(**manifest.columns(rows))


@contextmanager
def log_lines(console: Console) -> Iterator[None]:
    """Say on the console, once each, what the data path logs: bad clips and notes."""
    if not console.enabled:  # not the first rank: standard error shows its warnings
        yield
        return
    handler = _Lines(console)
    log = logging.getLogger("masktrain.data")
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.level, log.propagate = before


class _Lines(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text in self._said:  # the loaders of training and validation may meet the same clip
            return
        self._said.add(text)
        say = self._console.warn if record.levelno >= logging.WARNING else self._console.note
        say(text)
