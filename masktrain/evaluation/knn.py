# SPDX-License-Identifier: Apache-2.0
"""Classification by the nearest neighbours among the training clips: nothing is learned and nothing is tuned.

facebookresearch/dino:eval_knn.py: cosine similarity, and each of the k nearest training clips votes for its class with
weight exp(similarity / 0.07); of the numbers of neighbours that it tries it calls 20 the best. Features are neither
centred nor scaled. A plain vote gives all neighbours the same weight.

The number that counts, 20 neighbours and weighted votes on the last layer, is fixed beforehand; other k, plain votes and
other layers are shown beside it, and none of them is chosen on test clips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from masktrain.errors import ConfigError, DataError
from masktrain.evaluation.encoder import (
    FeatureSource,
    load_encoder,
    log_mel_baseline,
    untrained_encoder,
)
from masktrain.evaluation.features import clip_features
from masktrain.evaluation.intervals import t_interval
from masktrain.evaluation.labels import LabelledSet, Split
from masktrain.evaluation.linear import heard
from masktrain.evaluation.metrics import accuracy, average_precisions

Progress = Callable[[str, int, int], None]
Against = Literal["untrained", "logmel"]

NEIGHBOURS = 20
TEMPERATURE = 0.07
# similarities held at once, in bytes of float32, and test clips whose votes are counted at once
CHUNK_BYTES = 1 << 28
ROWS = 256


def nearest(train: Tensor, test: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return cosine similarity and row of the `k` training clips nearest to each test clip, nearest first.

    train: (C, D), test: (Q, D), floating, not normalised; a row of zeros has similarity 0 to everything. k: at least
    1; all C where it is more. Returns (Q, k) in the dtype of `test`, and (Q, k) int64. Memory does not grow with Q.
    """
    k = min(k, len(train))
    clips, rows = normalize(train, dim=1), normalize(test, dim=1)
    some = max(1, CHUNK_BYTES // (4 * len(train)))
    found = [(part @ clips.T).topk(k, dim=1) for part in rows.split(some)]
    return torch.cat([top.values for top in found]), torch.cat([top.indices for top in found])


def class_scores(similarity: Tensor, labels: Tensor, temperature: float | None) -> Tensor:
    """Return (Q, K) scores of the classes, the weighted votes as shares of all: the larger, the likelier.

    similarity: (Q, k) of the neighbours of each clip, as `nearest` gives it. labels: (Q, k, K), 1 where that neighbour
    is of the class, else 0. temperature: of the weights exp(similarity / temperature), above 0; None counts every neighbour
    once, and of classes with as many votes prefers that whose neighbours are nearer.
    """
    if temperature is not None:
        return torch.einsum("qn,qnk->qk", torch.softmax(similarity / temperature, 1), labels)
    # (1 + cos) / 2 lies in [0, 1]: over k + 1, all neighbours of a class together stay below one vote
    nearness = (1 + similarity) / (2 * (similarity.shape[1] + 1))
    return torch.einsum("qn,qnk->qk", 1 + nearness, labels) / (similarity.shape[1] + 1)


def knn_score(
    features: Tensor,
    labels: NDArray[Any],
    classes: int,
    split: Split,
    k: int,
    temperature: float | None,
) -> float:
    """Return accuracy or mAP on the test clips of a split; the neighbours are its training clips.

    features: (C, D). labels: (C,) class indices, or (C, K) 0 or 1, where a class without test clips counts for nothing.
    Raises DataError for a split without training or test clips, or features that are not finite.
    """
    for part, clips in (("training", split.train), ("test", split.test)):
        if len(clips) == 0:
            raise DataError(f"{split.name}: has no {part} clips. Check the fold or split column.")
    train, test = (
        features.index_select(0, torch.from_numpy(clips).to(features.device))
        for clips in (split.train, split.test)
    )
    if not bool(torch.isfinite(train).all() and torch.isfinite(test).all()):
        raise DataError(
            f"{split.name}: the features hold numbers that are not finite; the weights are broken."
        )
    similarity, rows = nearest(train, test, k)
    hot = np.eye(classes, dtype=np.uint8)[labels] if labels.ndim == 1 else labels
    scores = [
        class_scores(s, torch.from_numpy(hot[split.train[r.cpu().numpy()]]).to(s), temperature).cpu().numpy()
        for s, r in zip(similarity.split(ROWS), rows.split(ROWS), strict=True)
    ]
    truth = labels[split.test]
    if truth.ndim == 1:
        return accuracy(np.concatenate(scores), truth)
    return float(np.nanmean(average_precisions(np.concatenate(scores), truth)))


# --- a report ---


@dataclass(frozen=True)
class KnnConfig:
    """ks: numbers of neighbours. temperature: of the weighted votes. every_layer: else the last one alone. batch_size:
    clips encoded at once."""

    ks: tuple[int, ...] = (1, 10, NEIGHBOURS)
    temperature: float = TEMPERATURE
    every_layer: bool = False
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ConfigError(f"--k: a number of neighbours must be at least 1; received {list(self.ks)}.")
        if not 0 < self.temperature < np.inf:
            raise ConfigError(f"--temperature: must be above 0 and finite; received {self.temperature}.")


def evaluate_knn(
    checkpoints: Sequence[Path],
    labelled: LabelledSet,
    config: KnnConfig,
    *,
    against: Sequence[Against] = (),
    device: torch.device,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return what the command reports: for each encoder, layer, number of neighbours and kind of vote the score of every
    split, their mean and its 95 % interval over the splits. progress: called with (what, done, total)."""
    if not labelled.splits:
        raise DataError(f"{labelled.name}: has no fold or split column, so nothing in it is held out.")

    def rows(source: FeatureSource) -> list[dict[str, Any]]:
        layers = list(range(1, source.n_layers + 1)) if config.every_layer else [source.n_layers]
        advance = None if progress is None else lambda d, n: progress(f"features: {source.name}", d, n)
        features = clip_features(
            source, labelled, layers=layers, cache=cache, batch_size=config.batch_size, progress=advance
        )
        return [
            _row(x.to(device), labelled, layer, k, temperature)
            for layer, x in zip(layers, features, strict=True)
            for temperature in (config.temperature, None)
            for k in config.ks
        ]

    encoders = []
    for path in checkpoints:
        encoder = load_encoder(path, device)
        others = {}
        for kind in against:
            other = (
                untrained_encoder(path, device, 0) if kind == "untrained" else log_mel_baseline(path, device)
            )
            others[kind] = {"name": other.name, "scores": rows(other)}
        encoders.append(
            {
                "checkpoint": str(path),
                "name": encoder.name,
                "fingerprint": encoder.fingerprint,
                "pretraining": asdict(heard(path, labelled)),
                "scores": rows(encoder),
                "against": others,
            }
        )
    return {
        "task": labelled.name,
        "metric": labelled.metric,
        "clips": len(labelled.manifest),
        "classes": list(labelled.classes),
        "splits": [{"name": s.name, "train": len(s.train), "test": len(s.test)} for s in labelled.splits],
        "encoders": encoders,
    }


def _row(
    features: Tensor, labelled: LabelledSet, layer: int, k: int, temperature: float | None
) -> dict[str, Any]:
    classes = len(labelled.classes)
    scores = [
        knn_score(features, labelled.labels, classes, split, k, temperature) for split in labelled.splits
    ]
    return {
        "layer": layer,
        "k": k,
        "vote": "plain" if temperature is None else "weighted",
        "temperature": temperature,
        "scores": scores,
        **asdict(t_interval(scores)),
    }
