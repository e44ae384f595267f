# SPDX-License-Identifier: Apache-2.0
"""A probe of the model while it trains: how well its features tell the classes of one held-out fold.

The features are those that `masktrain evaluate` computes from a checkpoint: last layer, float32, evaluation mode. The
first fold or split of the manifest is read, always the same clips, so that readings can be compared. Nothing of the run
depends on them: weights, running statistics, the mode of the model and all random states stay as they are.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from masktrain.data.manifest import Manifest
from masktrain.errors import ConfigError
from masktrain.evaluation.encoder import FrozenEncoder
from masktrain.evaluation.features import clip_features
from masktrain.evaluation.knn import NEIGHBOURS, TEMPERATURE, knn_score
from masktrain.evaluation.labels import LabelledSet, Split, read_labelled
from masktrain.evaluation.probe import LinearHead, ProbeConfig, Run, train
from masktrain.training.corpus import subset
from masktrain.training.monitor import Reading
from masktrain.training.run_spec import ProbeSpec
from masktrain.training.step import Step

MOST_TRAIN, MOST_TEST = 2000, 1000
"""Clips of a reading: more would tell little more and cost as much as the training."""
SEED = 42
BATCH = 32


class ProbeMonitor:
    """Implements `masktrain.training.monitor.Monitor`. labelled: the clips that are read, with one split."""

    def __init__(self, labelled: LabelledSet, kind: str, every: int | None) -> None:
        """kind: "knn" or "linear". every: steps between readings, None for a tenth of the run. Of a manifest of several
        splits the first counts, and of more clips than a reading takes a random part."""
        self.left_out = len(labelled.splits) - 1
        self.whole = labelled.splits[0]
        self.labelled = first_split(labelled)
        self.kind = kind
        self.every = every

    def describe(self, clips: Manifest, steps: int) -> list[str]:
        """Return what the start block says. clips: of the training. steps: of the run."""
        split, readings = self.labelled.splits[0], sum(self.due(done, steps) for done in range(steps + 1))
        how = f"{NEIGHBOURS} nearest neighbours" if self.kind == "knn" else "a linear classifier"
        drawn = len(split.train) + len(split.test) < len(self.whole.train) + len(self.whole.test)
        others = f"; the other {self.left_out} are left alone" if self.left_out else ""
        lines = [
            f"{how} on the last layer, {self.labelled.name}, {split.name}{others}: {len(split.train)} train and "
            f"{len(split.test)} test clips{' drawn from it' if drawn else ''}",
            f"{readings} readings, one every {self._every(steps)} steps; no checkpoint is chosen by them",
        ]
        training = {os.path.realpath(clips.path(row)) for row in range(len(clips))}
        manifest = self.labelled.manifest
        heard = sum(os.path.realpath(manifest.path(row)) in training for row in split.test.tolist())
        if heard:
            lines.append(f"transductive: {heard} of its test clips are trained on, without their labels")
        return lines

    def due(self, done: int, steps: int) -> bool:
        """Whether a reading belongs behind `done` of `steps` steps: the untrained and the final model have theirs."""
        return done % self._every(steps) == 0 or done == steps

    def _every(self, steps: int) -> int:
        return self.every or max(1, steps // 10)

    def read(self, step: Step, done: int) -> Reading:
        """Return a reading of the model as it is now."""
        start = time.monotonic()
        model = step.model
        training = [module for module in model.modules() if module.training]
        devices = [step.world.device] if step.world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            model.eval()
            try:
                value = self._value(FrozenEncoder(step.recipe, model, step.recipe.name, step=done))
            finally:
                for module in training:
                    module.training = True
        seconds = time.monotonic() - start
        return Reading(done, self.kind, self.labelled.metric, value, chance(self.labelled), seconds)

    def _value(self, encoder: FrozenEncoder) -> float:
        features = clip_features(encoder, self.labelled, layers=[encoder.n_layers], batch_size=BATCH)
        features = features.to(encoder.device)
        split, labels = self.labelled.splits[0], self.labelled.labels
        classes = len(self.labelled.classes)
        if self.kind == "knn":
            return knn_score(features[0], labels, classes, split, NEIGHBOURS, TEMPERATURE)
        run = Run(split.train, split.valid, split.test, SEED)
        return train(LinearHead(features), labels, classes, [run], ProbeConfig())[0].score


def probe_monitor(spec: ProbeSpec) -> ProbeMonitor:
    """Return the monitor of a run. Raises DataError or ConfigError for labelled clips that cannot be used."""
    labelled = read_labelled(spec.data, label=spec.label)
    if not labelled.splits:
        raise ConfigError(
            f"--probe-data {spec.data}: has no fold or split column, so nothing in it is held out. Add one."
        )
    return ProbeMonitor(labelled, spec.kind, spec.every)


def first_split(labelled: LabelledSet) -> LabelledSet:
    """Return the clips of the first split alone, no more than a reading takes, in manifest order."""
    split = labelled.splits[0]
    rng = np.random.default_rng(SEED)
    train_rows = _drawn(rng, split.train, MOST_TRAIN)
    valid_rows = None if split.valid is None else _drawn(rng, split.valid, MOST_TEST)
    test_rows = _drawn(rng, split.test, MOST_TEST)
    kept = np.unique(np.concatenate([train_rows, test_rows, *([] if valid_rows is None else [valid_rows])]))
    groups = labelled.groups
    return replace(
        labelled,
        manifest=subset(labelled.manifest, kept),
        labels=labelled.labels[kept],
        groups=None if groups is None else tuple(groups[row] for row in kept.tolist()),
        splits=(
            Split(
                split.name,
                np.searchsorted(kept, train_rows),
                None if valid_rows is None else np.searchsorted(kept, valid_rows),
                np.searchsorted(kept, test_rows),
            ),
        ),
    )


def _drawn(rng: np.random.Generator, rows: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    if len(rows) <= most:
        return rows
    return np.sort(rng.choice(rows, most, replace=False))


def chance(labelled: LabelledSet) -> float:
    """Return what an answer reaches that does not look at the test clips of the first split: the commonest class of the
    training clips for accuracy; for mAP, any constant score, whose average precision is the share of the class."""
    split = labelled.splits[0]
    own: NDArray[Any] = labelled.labels[split.test]
    if own.ndim == 1:
        counts = np.bincount(labelled.labels[split.train], minlength=len(labelled.classes))
        return float((own == counts.argmax()).mean())
    shares = own.mean(0)
    return float(shares[shares > 0].mean())
