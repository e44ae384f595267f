# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours and their votes against definitions written out in float64, and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from masktrain.errors import ConfigError, DataError
from masktrain.evaluation import knn
from masktrain.evaluation.labels import Split


def cosines(train: NDArray[np.float64], test: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine similarity, 0 for a row of zeros."""
    rows, clips = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (test, train))
    similarity: NDArray[np.float64] = rows @ clips.T
    return similarity


def clusters(seed: int, clips: int = 90, classes: int = 5) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, clips)
    return rng.standard_normal((classes, 12))[labels] + rng.standard_normal((clips, 12)) * 1.5, labels


def split_of(clips: int, seed: int = 0) -> Split:
    rows = np.random.default_rng(seed).permutation(clips)
    return Split("fold 1", np.sort(rows[: 2 * clips // 3]), None, np.sort(rows[2 * clips // 3 :]))


@pytest.mark.parametrize("k", [1, 7, 60, 500])
def test_neighbours_are_those_of_a_full_sort(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(k)
    train, test = rng.standard_normal((60, 9)), rng.standard_normal((23, 9))
    train[3] = 0.0
    monkeypatch.setattr(knn, "CHUNK_BYTES", 4 * 60 * 5)  # five test clips at a time
    similarity, rows = knn.nearest(torch.from_numpy(train), torch.from_numpy(test), k)
    truth = cosines(train, test)
    order = np.argsort(-truth, axis=1)[:, :k]
    assert rows.tolist() == order.tolist()
    np.testing.assert_allclose(similarity.numpy(), np.take_along_axis(truth, order, 1), atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_votes_are_those_of_dino(seed: int) -> None:
    x, labels = clusters(seed)
    split = split_of(len(x), seed)
    k, temperature = 20, 0.07
    right = 0
    for row in split.test:
        similarity = cosines(x[split.train], x[[row]])[0]
        votes = np.zeros(5)
        for neighbour in np.argsort(-similarity)[:k]:
            votes[labels[split.train[neighbour]]] += np.exp(similarity[neighbour] / temperature)
        right += int(votes.argmax() == labels[row])
    score = knn.knn_score(torch.from_numpy(x), labels, 5, split, k, temperature)
    assert score == right / len(split.test)
    assert 0.3 < score < 1  # there is something to get wrong


@pytest.mark.parametrize("k", [1, 3])
def test_plain_votes_are_scikit_learns(k: int) -> None:
    # two classes and an odd k: no ties
    x, labels = clusters(11, classes=2)
    split = split_of(len(x))
    theirs = KNeighborsClassifier(k, metric="cosine").fit(x[split.train], labels[split.train])
    expected = theirs.score(x[split.test], labels[split.test])
    assert knn.knn_score(torch.from_numpy(x), labels, 2, split, k, None) == pytest.approx(expected)


def test_of_classes_with_as_many_votes_the_nearer_one_wins() -> None:
    hot = torch.tensor([[[1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 0], [1.0, 0, 0], [0, 0, 1.0]]])
    similarity = torch.tensor([[0.9, 0.8, 0.7, 0.65, 0.1]])
    assert int(knn.class_scores(similarity, hot, None).argmax()) == 0  # 0.9 + 0.65 > 0.8 + 0.7
    similarity[0, 3] = 0.55
    assert int(knn.class_scores(similarity, hot, None).argmax()) == 1
    # however near, one vote is less than two
    similarity = torch.tensor([[1.0, -1.0, -1.0, -1.0, -1.0]])
    assert int(knn.class_scores(similarity, hot[:, [0, 1, 2, 4, 4]], None).argmax()) != 0


@pytest.mark.parametrize("temperature", [1e-4, 0.07, 10.0])
def test_weighted_votes_are_finite_shares(temperature: float) -> None:
    similarity = 2 * torch.rand(6, 20, generator=torch.Generator().manual_seed(0)) - 1
    hot = torch.eye(4)[torch.randint(4, (6, 20), generator=torch.Generator().manual_seed(1))]
    scores = knn.class_scores(similarity.sort(descending=True).values, hot, temperature)
    torch.testing.assert_close(scores.sum(1), torch.ones(6))


def test_features_of_another_scale_vote_alike() -> None:
    x, labels = clusters(2)
    split = split_of(len(x))
    factors = np.random.default_rng(0).uniform(0.1, 10, (len(x), 1))
    scores = [knn.knn_score(torch.from_numpy(f), labels, 5, split, 20, 0.07) for f in (x, x * factors)]
    assert scores[0] == scores[1]


def test_several_labels_are_measured_by_average_precision() -> None:
    x, labels = clusters(3)
    rng = np.random.default_rng(3)
    many = (np.eye(6, dtype=np.uint8)[labels] | (rng.random((len(x), 6)) < 0.1)).astype(np.uint8)
    split = split_of(len(x))
    many[split.test, 5] = 0  # a class without test clips counts for nothing
    similarity = cosines(x[split.train], x[split.test])
    near = np.argsort(-similarity, axis=1)[:, :20]
    weights = np.exp(np.take_along_axis(similarity, near, 1) / 0.07)
    scores = np.einsum("qn,qnk->qk", weights / weights.sum(1, keepdims=True), many[split.train][near])
    expected = np.mean([average_precision_score(many[split.test, c], scores[:, c]) for c in range(5)])
    assert knn.knn_score(torch.from_numpy(x), many, 6, split, 20, 0.07) == pytest.approx(expected)


def test_what_cannot_be_classified_is_refused() -> None:
    x, labels = clusters(4)
    features, split = torch.from_numpy(x), split_of(len(x))
    with pytest.raises(DataError, match="no test clips"):
        knn.knn_score(features, labels, 5, Split("fold 1", split.train, None, split.test[:0]), 3, None)
    features[split.test[0], 0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        knn.knn_score(features, labels, 5, split, 3, None)
    for wrong in ({"ks": (0,)}, {"ks": ()}, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(ConfigError):
            knn.KnnConfig(**wrong)  # type: ignore[arg-type]
