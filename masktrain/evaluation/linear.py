# SPDX-License-Identifier: Apache-2.0
"""Linear evaluation of frozen encoders on labelled clips: scores, intervals, differences to what is no pretraining.

One head of each seed and split is trained (see `probe`), all together. Nothing is chosen on test clips: epochs, and
learning rates and layers where several are tried, are chosen on the validation part of each run. A score is shown with two
95 % intervals: over seeds (what another probe would give, EVAR's spread) and, for folds, over the splits (what other
clips would give).

Pretraining that has heard test clips is transductive: that is found from the run's own record of its data, by path and,
for files of equal size, by content.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.data.manifest import Entries, Manifest
from masktrain.data.readers import load_manifest
from masktrain.errors import ConfigError, MasktrainError
from masktrain.evaluation.encoder import (
    FeatureSource,
    FrozenEncoder,
    Pool,
    load_encoder,
    log_mel_baseline,
    untrained_encoder,
)
from masktrain.evaluation.features import clip_features, token_features
from masktrain.evaluation.intervals import Difference, paired, t_interval
from masktrain.evaluation.labels import LabelledSet
from masktrain.evaluation.leaks import check_leaks
from masktrain.evaluation.metrics import average_precisions, confusion, recall_precision
from masktrain.evaluation.probe import (
    AttentiveHead,
    Epoch,
    Fit,
    Head,
    LinearHead,
    ProbeConfig,
    Run,
    WeightedHead,
    train,
)
from masktrain.training.corpus import demo_folder
from masktrain.training.run_spec import CONFIG, read_spec

Array = NDArray[Any]
HeadName = Literal["last", "layers", "weighted", "attentive"]
Against = Literal["untrained", "logmel"]
Progress = Callable[[str, int, int], None]

FIRST_SEED = 42  # EVAR's
UNTRAINED = 3  # encoders that stand for the untrained one: probe seed s gets number s modulo this
HASHED = 200_000  # clips of a pretraining corpus up to which contents are compared as well as paths


@dataclass(frozen=True)
class LinearConfig:
    """head: "last" (one layer), "layers" (each layer for itself), "weighted" (learned sum of all layers), "attentive"
    (learned query over the tokens of one layer). layer: which one, counted from 1; None: the last. seeds: how many, from
    42 on. lrs: learning rates; of several, each run takes that of its best validation metric. probe: see
    `ProbeConfig`. pool: how the patches of a frame become one vector, see `Pool`. batch_size: clips encoded at once."""

    head: HeadName = "last"
    layer: int | None = None
    seeds: int = 10
    lrs: tuple[float, ...] = (3e-4,)
    pool: Pool = "concat"
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name in ("seeds", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1; received {getattr(self, name)}.")
        for lr in self.lrs:
            if not 0 < lr < 1e3:
                raise ConfigError(f"lr: must lie above 0 and below 1000; received {lr}.")
        if not self.lrs:
            raise ConfigError("lr: at least one learning rate is needed; received none.")
        if self.layer is not None and self.head in ("layers", "weighted"):
            raise ConfigError(f"layer: the head {self.head!r} takes all layers; leave --layer out.")


@dataclass(frozen=True, eq=False)
class Scores:
    """One way of getting features, probed. layers: counted from 1, what the first index of `fits` means; a head that takes
    all layers has one entry, 0. fits: [layer][seed][split]."""

    name: str
    layers: tuple[int, ...]
    fits: list[list[list[Fit]]]

    def grid(self, place: int = -1) -> NDArray[np.float64]:
        """Return (seeds, splits) scores of one entry of `layers`."""
        return np.array([[fit.score for fit in row] for row in self.fits[place]])

    def chosen(self) -> NDArray[np.float64]:
        """Return (seeds, splits) scores where each run takes the layer of its best validation metric."""
        return np.array(
            [
                [_best([layer[seed][split] for layer in self.fits]).score for split in range(len(row))]
                for seed, row in enumerate(self.fits[0])
            ]
        )


@dataclass(frozen=True)
class Heard:
    """Whether pretraining has heard the test clips. state: "inductive": none of them; "transductive": some; "unknown".
    clips: {split: test clips heard}. why: how it was found, or why it is unknown."""

    state: Literal["inductive", "transductive", "unknown"]
    clips: dict[str, int]
    why: str


def evaluate_linear(
    checkpoints: Sequence[Path],
    labelled: LabelledSet,
    config: LinearConfig,
    *,
    against: Sequence[Against] = (),
    device: torch.device,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Probe every checkpoint, and what it is compared with, on the same splits and seeds.

    Returns the report, JSON data. Raises ConfigError, DataError or CheckpointError.
    """
    seeds = range(FIRST_SEED, FIRST_SEED + config.seeds)
    encoders = [load_encoder(path, device) for path in checkpoints]  # what is absent is found before the work
    leaks = check_leaks(labelled, None if progress is None else partial(progress, "looking for leaks"))
    prober = _Prober(labelled, config, device, cache, progress)
    results, rows = [], []
    for path, encoder in zip(checkpoints, encoders, strict=True):
        ours = prober.encoder(encoder, seeds)
        others = {kind: prober.baseline(kind, path, seeds) for kind in against}
        results.append((ours, others))
        rows.append(_row(path, encoder, ours, others, prober))
    report = {
        "task": labelled.name,
        "metric": labelled.metric,
        "clips": len(labelled.manifest),
        "classes": list(labelled.classes),
        "unit_seconds": labelled.unit_seconds,
        "notes": [*labelled.notes, *leaks],
        "splits": [_split_row(labelled, number) for number in range(len(labelled.splits))],
        "head": config.head,
        "pool": config.pool,
        "seeds": list(seeds),
        "lr": list(config.lrs),
        "probe": asdict(config.probe),
        "encoders": rows,
    }
    together = _together([ours for ours, _ in results], [others for _, others in results], rows)
    return report | ({"together": together} if together else {})


class _Prober:
    """Features of one labelled set, and heads trained on them."""

    def __init__(
        self,
        labelled: LabelledSet,
        config: LinearConfig,
        device: torch.device,
        cache: Path | None,
        progress: Progress | None,
    ) -> None:
        self.labelled, self.config, self.device, self.cache = labelled, config, device, cache
        self.progress = progress

    def encoder(self, encoder: FrozenEncoder, seeds: Sequence[int]) -> Scores:
        config = self.config
        encoder.pool = config.pool
        layer = encoder.n_layers if config.layer is None else config.layer
        if not 1 <= layer <= encoder.n_layers:
            raise ConfigError(
                f"--layer {layer}: {encoder.name} has the layers 1 to {encoder.n_layers}. Name one of them."
            )
        if config.head == "attentive":
            tokens, cu_tokens = token_features(
                encoder,
                self.labelled,
                layer=layer,
                cache=self.cache,
                batch_size=config.batch_size,
                progress=self._advance(encoder.name),
            )
            head: Head = AttentiveHead(tokens.to(self.device), cu_tokens.tolist())
            return self._probe(encoder.name, head, (layer,), seeds)
        if config.head == "last":
            return self._probe(encoder.name, LinearHead(self._features(encoder, [layer])), (layer,), seeds)
        layers = tuple(range(1, encoder.n_layers + 1))
        features = self._features(encoder, layers)
        if config.head == "weighted":
            return self._probe(encoder.name, WeightedHead(features), (0,), seeds)
        return self._probe(encoder.name, LinearHead(features), layers, seeds)

    def baseline(self, kind: Against, path: Path, seeds: Sequence[int]) -> Scores:
        """Return the scores of the untrained encoders, or of the log-mel statistics with a linear head."""
        if kind == "logmel":
            source = log_mel_baseline(path, self.device)
            return self._probe(source.name, LinearHead(self._features(source, [1])), (1,), seeds)
        parts = {}
        for number in range(min(UNTRAINED, len(seeds))):
            encoder = untrained_encoder(path, self.device, number)
            parts[number] = self.encoder(encoder, seeds[number::UNTRAINED])
        fits = [
            [parts[place % UNTRAINED].fits[layer][place // UNTRAINED] for place in range(len(seeds))]
            for layer in range(len(parts[0].layers))
        ]
        return Scores(f"untrained ({len(parts)} draws)", parts[0].layers, fits)

    def _features(self, source: FeatureSource, layers: Sequence[int]) -> Tensor:
        return clip_features(
            source,
            self.labelled,
            layers=layers,
            cache=self.cache,
            batch_size=self.config.batch_size,
            progress=self._advance(source.name),
        ).to(self.device)

    def _advance(self, name: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else partial(progress, f"features: {name}")

    def _probe(self, name: str, head: Head, layers: tuple[int, ...], seeds: Sequence[int]) -> Scores:
        config, splits = self.config, self.labelled.splits
        runs = [
            Run(split.train, split.valid, split.test, seed, number, place, lr)
            for place in range(len(layers))
            for seed in seeds
            for number, split in enumerate(splits)
            for lr in config.lrs
        ]
        progress = self.progress

        def advance(epoch: Epoch) -> None:
            if progress is not None:
                progress(f"{len(runs)} probes: {name}", epoch.number + 1, config.probe.epochs)

        fits = train(head, self.labelled.labels, len(self.labelled.classes), runs, config.probe, advance)
        groups = iter([_best(fits[i : i + len(config.lrs)]) for i in range(0, len(fits), len(config.lrs))])
        return Scores(name, layers, [[[next(groups) for _ in splits] for _ in seeds] for _ in layers])


def _best(fits: Sequence[Fit]) -> Fit:
    """Return the fit of the best validation metric, of equal ones that of the lower validation loss."""
    return max(fits, key=lambda fit: (fit.valid, -fit.valid_loss))


# --- the report ---


def summary(scores: NDArray[np.float64]) -> dict[str, Any]:
    """Return mean, spread and intervals of (seeds, splits) scores."""
    over_splits = t_interval(scores.mean(0)) if scores.shape[1] > 1 else None
    return {
        "mean": float(scores.mean()),
        "over_seeds": asdict(t_interval(scores.mean(1))),
        "over_splits": asdict(over_splits) if over_splits else None,
        "scores": scores.tolist(),
    }


def _difference(gap: Difference) -> dict[str, Any]:
    return asdict(gap) | {"excludes_zero": gap.excludes_zero}


def _row(
    path: Path, encoder: FrozenEncoder, ours: Scores, others: dict[Against, Scores], prober: _Prober
) -> dict[str, Any]:
    labelled, most = prober.labelled, prober.config.probe.epochs
    row = {
        "checkpoint": str(path),
        "name": encoder.name,
        "recipe": encoder.recipe.name,
        "size": encoder.recipe.size,
        "step": encoder.step,
        "fingerprint": encoder.fingerprint,
        "pretraining": asdict(heard(path, labelled)),
        **_scores_row(ours, most),
        "classes": class_rows(ours, labelled),
        "confusion": confusion_of(ours, labelled).tolist() if labelled.metric == "accuracy" else None,
        "against": {},
    }
    for kind, theirs in others.items():
        draws = _draws(kind, len(ours.fits[-1]))
        gap = paired(_grouped(ours.grid(), draws), _grouped(theirs.grid(), draws))
        row["against"][kind] = {
            "name": theirs.name,
            **_scores_row(theirs, most),
            "difference": _difference(gap),
        }
    return row


def _scores_row(scores: Scores, most: int) -> dict[str, Any]:
    """Return what the last entry of `layers` scores, and each of them and the choice between them where there are
    several. most: epochs that a run may take; unfinished is the share of runs that took them."""
    row = summary(scores.grid()) | {
        "layer": scores.layers[-1],
        "unfinished": float(np.mean([fit.epochs_run == most for seed in scores.fits[-1] for fit in seed])),
        "epochs_run": [[fit.epochs_run for fit in seed] for seed in scores.fits[-1]],
        "lr": [[fit.run.lr for fit in seed] for seed in scores.fits[-1]],
    }
    if "mix" in scores.fits[0][0][0].parameters:
        mixes = torch.stack(
            [fit.parameters["mix"].softmax(0).cpu() for seed in scores.fits[0] for fit in seed]
        )
        row["layer_weights"] = mixes.mean(0).tolist()
    if len(scores.layers) > 1:
        row["layers"] = [
            {"layer": layer, **summary(scores.grid(place))} for place, layer in enumerate(scores.layers)
        ]
        row["layer_chosen_on_validation"] = summary(scores.chosen())
    return row


def _together(
    ours: Sequence[Scores], others: Sequence[dict[Against, Scores]], rows: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the scores of several checkpoints of one recipe as one: a checkpoint, by the mean of its seeds, meets one
    draw of the untrained encoder."""
    kinds = {(row["recipe"], row["size"], row["step"]) for row in rows}
    if len(rows) < 2 or len(kinds) > 1:
        return None
    # checkpoints are what is drawn anew, not the probes on each
    means = np.stack([scores.grid().mean(0) for scores in ours])
    gaps = {}
    for kind, theirs in others[0].items():
        grid = theirs.grid()
        draws = min(_draws(kind, len(grid)), len(means))
        gaps[kind] = _difference(paired(_grouped(means, draws), _grouped(grid, draws)))
    grid = np.concatenate([scores.grid() for scores in ours])
    return summary(grid) | {"over_checkpoints": asdict(t_interval(means.mean(1))), "against": gaps}


def _draws(kind: Against, seeds: int) -> int:
    """Return how many of the seeds' scores are independent of one another."""
    return min(UNTRAINED, seeds) if kind == "untrained" else seeds


def _grouped(scores: NDArray[np.float64], draws: int) -> NDArray[np.float64]:
    """Return (draws, splits), row d the mean of rows d, d + draws, ...: what one draw scores."""
    return np.stack([scores[draw::draws].mean(0) for draw in range(draws)])


def _split_row(labelled: LabelledSet, number: int) -> dict[str, Any]:
    """Return the number of clips of each part and class of a split."""
    split = labelled.splits[number]
    parts = {"train": split.train, "valid": split.valid, "test": split.test}
    return {
        "name": split.name,
        **{name: None if rows is None else len(rows) for name, rows in parts.items()},
        "clips_of_class": {
            name: None if rows is None else class_counts(labelled, rows).tolist()
            for name, rows in parts.items()
        },
    }


def class_counts(labelled: LabelledSet, rows: Array) -> Array:
    """Return (K,) how many of the rows are of each class."""
    own = labelled.labels[rows]
    if own.ndim == 2:
        return own.astype(np.int64).sum(0)
    return np.bincount(own, minlength=len(labelled.classes))


def confusion_of(scores: Scores, labelled: LabelledSet) -> Array:
    """Return (K, K) float64: test clips of the row's class that were answered with the column's, all splits together,
    mean over the seeds."""
    total = np.zeros((len(labelled.classes),) * 2)
    for fit in (fit for seed in scores.fits[-1] for fit in seed):
        total += confusion(fit.outputs, labelled.labels[fit.run.test], len(labelled.classes))
    return total / len(scores.fits[-1])


def class_rows(scores: Scores, labelled: LabelledSet) -> list[dict[str, Any]]:
    """Return for each class its test clips and recall, precision and F1, or its average precision: of all splits together,
    mean over the seeds; None where no test clip is of it or none was answered with it."""
    tests = np.concatenate([split.test for split in labelled.splits])
    counts = class_counts(labelled, tests)
    if labelled.metric == "accuracy":
        recall, precision = recall_precision(confusion_of(scores, labelled))
        with np.errstate(invalid="ignore", divide="ignore"):
            f1 = 2 * recall * precision / (recall + precision)
        columns = {"recall": recall, "precision": precision, "f1": f1}
    else:
        values = [
            average_precisions(fit.outputs, labelled.labels[fit.run.test])
            for seed in scores.fits[-1]
            for fit in seed
        ]
        columns = {"average_precision": _mean_known(np.stack(values))}
    return [
        {
            "class": name,
            "clips": int(counts[k]),
            **{key: None if np.isnan(value[k]) else float(value[k]) for key, value in columns.items()},
        }
        for k, name in enumerate(labelled.classes)
    ]


def _mean_known(values: Array) -> Array:
    """Return the means of the columns over what is no NaN; NaN where all are."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: Array = np.where(known, values, 0.0).sum(0) / known.sum(0)
    return mean


# --- pretraining data ---


def heard(checkpoint: Path, labelled: LabelledSet) -> Heard:
    """Find out whether the run that a checkpoint belongs to was trained on test clips, see the module."""
    folders = [checkpoint, checkpoint.parent, checkpoint.parent.parent]
    run = next((folder for folder in folders if (folder / CONFIG).is_file()), None)
    if run is None:
        return Heard("unknown", {}, "the checkpoint lies in no run folder, which would name its data")
    try:
        data = read_spec(run).data
        if not data:
            data = (demo_folder(),)
            if not data[0].is_dir():
                return Heard("inductive", dict.fromkeys(_names(labelled), 0), "pretrained on the demo corpus")
        entries, _ = load_manifest(data)
    except MasktrainError as error:
        return Heard("unknown", {}, f"the data of the run cannot be read: {error}")
    tests = {split.name: split.test for split in labelled.splits}
    rows = np.unique(np.concatenate(list(tests.values())))
    known, how = _also_in(labelled.manifest, rows, entries)
    clips = {name: int(np.isin(test, known).sum()) for name, test in tests.items()}
    state: Literal["inductive", "transductive"] = "transductive" if known.size else "inductive"
    return Heard(state, clips, f"compared with the {len(entries)} clips that the run names, {how}")


def _names(labelled: LabelledSet) -> list[str]:
    return [split.name for split in labelled.splits]


def _also_in(manifest: Manifest, rows: Array, entries: Entries) -> tuple[Array, str]:
    """Return those of the rows whose file is among the entries, by path or by content, and how it was found."""
    paths = {int(row): os.path.realpath(manifest.path(int(row))) for row in rows}
    theirs = {os.path.realpath(entries.path(row)) for row in range(len(entries))}
    found = {row for row, path in paths.items() if path in theirs}
    rest = {row: path for row, path in paths.items() if row not in found}
    if len(entries) > HASHED:
        return np.array(sorted(found), dtype=np.int64), f"by path only, being over {HASHED}"
    sizes: dict[int, list[str]] = {}
    for path, size in _sizes(theirs):
        sizes.setdefault(size, []).append(path)
    digests: dict[int, set[bytes]] = {}
    for row, path in rest.items():
        for _, size in _sizes([path]):
            if size in sizes:
                if size not in digests:
                    digests[size] = {_digest(other) for other in sizes[size]}
                if _digest(path) in digests[size]:
                    found.add(row)
    return np.array(sorted(found), dtype=np.int64), "by path and content of the files"


def _sizes(paths: Iterable[str]) -> Iterable[tuple[str, int]]:
    """Yield the files that there are, with their bytes."""
    for path in paths:
        try:
            yield path, os.stat(path).st_size
        except OSError:
            continue


def _digest(path: str) -> bytes:
    """Return the SHA-256 of a file; of one that cannot be read, of its name, which no other file has."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return hashlib.sha256(os.fsencode(path)).digest()
