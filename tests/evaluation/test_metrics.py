# SPDX-License-Identifier: Apache-2.0
"""The batched metrics against scikit-learn, ties and padding included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, precision_recall_fscore_support

from masktrain.evaluation.metrics import (
    accuracy,
    average_precisions,
    batched_accuracy,
    batched_average_precision,
    confusion,
    recall_precision,
)


@pytest.mark.parametrize("levels", [3, 50, 10**9], ids=["many ties", "some ties", "no ties"])
def test_average_precision_is_scikit_learns(levels: int) -> None:
    rng = np.random.default_rng(0)
    runs, n, classes = 4, 60, 5
    scores = rng.integers(0, levels, (runs, n, classes)) / levels
    targets = rng.random((runs, n, classes)) < rng.uniform(0.02, 0.6, (runs, 1, classes))
    sizes = np.array([60, 41, 7, 1])
    counted = np.arange(n) < sizes[:, None]
    # what pads must not matter, whatever it holds
    scores[~counted], targets[~counted] = 1e9, True
    found = batched_average_precision(
        torch.from_numpy(scores), torch.from_numpy(targets), torch.from_numpy(counted)
    )
    for run, size in enumerate(sizes):
        for k in range(classes):
            own = targets[run, :size, k]
            if own.any():
                truth = average_precision_score(own, scores[run, :size, k])
                assert float(found[run, k]) == pytest.approx(truth, abs=1e-12)
            else:
                assert torch.isnan(found[run, k])
        listed = average_precisions(scores[run, :size], targets[run, :size])
        np.testing.assert_allclose(listed, found[run], atol=1e-12)


def test_accuracy_counts_the_first_of_equal_scores_and_no_padding() -> None:
    scores = torch.tensor([[[1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [5.0, 0.0, 0.0]]])
    labels = torch.tensor([[0, 2, 1]])
    assert batched_accuracy(scores, labels, torch.tensor([[True, True, False]])).tolist() == [0.5]
    assert batched_accuracy(scores, labels, torch.tensor([[True, True, True]])).tolist() == [1 / 3]


def test_confusion_and_its_rates_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    labels, scores = rng.integers(0, 6, 200), rng.normal(size=(200, 7))
    counts = confusion(scores, labels, 7)
    answers = scores.argmax(1)
    assert counts.shape == (7, 7) and counts.sum() == 200
    assert counts[2, 3] == ((labels == 2) & (answers == 3)).sum()
    recall, precision = recall_precision(counts)
    truth = precision_recall_fscore_support(labels, answers, labels=range(7), zero_division=np.nan)
    np.testing.assert_allclose(precision, truth[0])
    np.testing.assert_allclose(recall, truth[1])
    assert np.isnan(recall[6]), "a class that no clip is of"
    assert accuracy(scores, labels) == accuracy_score(labels, answers)
