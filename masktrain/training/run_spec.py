# SPDX-License-Identifier: Apache-2.0
"""A run as it was asked for, and how it is stored in and read from config.json."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from masktrain import __version__
from masktrain.config import flatten, from_dict, to_dict
from masktrain.errors import CheckpointError, ConfigError
from masktrain.training.recipe import Recipe

CONFIG = "config.json"
# fields that change how fast a run goes and nothing else: a resumed run may have other ones
SAME_RUN = ("data.workers", "data.prefetch")
TOO_LARGE = 1 << 53


@dataclass(frozen=True)
class ProbeSpec:
    """Labelled clips on which the model is read during a run; nothing of the run depends on it.

    data: a manifest with folds or splits. label: the column of its classes, None for the only one that can be it.
    every: steps between readings, None for a tenth of the run. kind: of the classifier.
    """

    data: Path
    label: str | None
    every: int | None
    kind: Literal["knn", "linear"]

    def to_json(self) -> dict[str, Any]:
        """Return what config.json holds of it."""
        return {"data": str(self.data), "label": self.label, "every": self.every, "kind": self.kind}

    @staticmethod
    def from_json(stored: dict[str, Any]) -> ProbeSpec:
        """Return what `to_json` stored. Raises KeyError, TypeError or ConfigError for something else."""
        if stored["kind"] not in ("knn", "linear"):
            raise ConfigError(f"run.probe.kind: must be knn or linear; received {stored['kind']!r}.")
        every = None if stored["every"] is None else int(stored["every"])
        label = None if stored["label"] is None else str(stored["label"])
        return ProbeSpec(Path(stored["data"]), label, every, stored["kind"])


@dataclass(frozen=True)
class RunSpec:
    """recipe: resolved but for a run length asked for in minutes. data: manifests, none for the demo corpus.
    device: as asked for. notes: what was chosen for the user, and why. probe: readings on labelled clips, if any."""

    recipe: Recipe
    data: tuple[Path, ...]
    out: Path
    device: str
    minutes: float | None
    init_from: Path | None
    resume: bool
    notes: tuple[str, ...]
    probe: ProbeSpec | None = None


def same_run(field: str) -> bool:
    """Whether runs that differ in this dotted field compute the same."""
    return field in SAME_RUN


def check_numbers(recipe: Recipe) -> None:
    """Raise ConfigError for a number that is not finite, or a whole one that no size of a tensor could be."""
    for name, value in flatten(recipe).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name}: must be a finite number; received {value}.")
        if isinstance(value, int) and abs(value) >= TOO_LARGE:
            raise ConfigError(f"{name}: must be under 2^53; received {str(value)[:40]}.")


def spec_to_json(spec: RunSpec, manifest_digest: str) -> dict[str, Any]:
    """Return what config.json holds."""
    return {
        "masktrain": __version__,
        "recipe": to_dict(spec.recipe),
        "run": {
            "data": [str(p) for p in spec.data],
            "manifest_digest": manifest_digest,
            "device": spec.device,
            "init_from": str(spec.init_from) if spec.init_from else None,
            "probe": spec.probe.to_json() if spec.probe else None,
        },
    }


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not os.path.isdir(folder):
        raise ConfigError(f"--resume {folder}: no such folder.")
    if not os.path.isfile(path):
        raise ConfigError(f"--resume {folder}: holds no {CONFIG}, so no run was started there.")
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). Restore it, or start a new run.") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("run"), dict):
        raise CheckpointError(f"{path}: is not the config of a run. Restore it, or start a new run.")
    return stored


def read_spec(folder: Path) -> RunSpec:
    """Return the run stored in `folder`, to be resumed. Raises ConfigError or CheckpointError where there is none."""
    stored = _read(folder)
    try:
        run = stored["run"]
        return RunSpec(
            recipe=from_dict(Recipe, stored["recipe"], "recipe"),
            data=tuple(Path(p) for p in run["data"]),
            out=folder,
            device=str(run["device"]),
            minutes=None,
            init_from=Path(run["init_from"]) if run["init_from"] else None,
            resume=True,
            notes=(),
            probe=ProbeSpec.from_json(run["probe"]) if run.get("probe") else None,
        )
    except (KeyError, TypeError, OverflowError, ConfigError) as error:
        raise CheckpointError(
            f"{folder / CONFIG}: does not describe a run: {error} Restore it, or start a new run."
        ) from error


def stored_manifest_digest(folder: Path) -> str:
    """Return the digest of the clips that the run in `folder` was started with."""
    return str(_read(folder)["run"].get("manifest_digest"))
