# SPDX-License-Identifier: Apache-2.0
"""Accuracy, mean average precision, confusion: of one classifier for a report, of many at once for early stopping.

Reported numbers are scikit-learn's. During training a metric is needed after every epoch of every run, so average
precision is also here as one batched sort; both treat tied scores alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]


def batched_accuracy(scores: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Return (R,) float64 shares of right answers: the first of several highest scores is the answer.

    scores: (R, n, K). labels: (R, n) int64. counted: (R, n) bool, False for rows that only pad.
    """
    right = (scores.argmax(-1) == labels) & counted
    return right.sum(1).double() / counted.sum(1)


def batched_average_precision(scores: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Return (R, K) float64 average precision of every class, NaN for a class without positives.

    AP = sum over positives of the precision at the threshold that admits them, over their number; items of equal
    score are admitted together (scikit-learn's definition). scores: (R, n, K), finite. targets: (R, n, K) bool.
    counted: (R, n) bool, False for rows that only pad.
    """
    scores = scores.masked_fill(~counted[..., None], -torch.inf).transpose(1, 2)
    targets = (targets & counted[..., None]).transpose(1, 2)
    ordered, order = scores.sort(dim=-1, descending=True)
    positive = targets.gather(-1, order).double()
    places = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    # the last place of each group of equal scores: where its threshold lies
    ends = torch.ones_like(ordered, dtype=torch.bool)
    ends[..., :-1] = ordered[..., 1:] != ordered[..., :-1]
    last = torch.where(ends, places, scores.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    hits = positive.cumsum(-1).gather(-1, last - 1)
    return (positive * hits / last).sum(-1) / positive.sum(-1)


def accuracy(scores: Array, labels: Array) -> float:
    """Return the share of right answers. scores: (n, K). labels: (n,) class indices."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, scores.argmax(1)))


def average_precisions(scores: Array, targets: Array) -> Array:
    """Return (K,) scikit-learn's average precision of every class, NaN where none of the items has it.

    scores: (n, K). targets: (n, K) 0 or 1.
    """
    from sklearn.metrics import average_precision_score

    present = targets.sum(0) > 0
    return np.array(
        [
            average_precision_score(targets[:, k], scores[:, k]) if present[k] else np.nan
            for k in range(targets.shape[1])
        ]
    )


def confusion(scores: Array, labels: Array, classes: int) -> Array:
    """Return (K, K) int64 counts: row is the true class, column the answer. scores: (n, K). labels: (n,)."""
    from sklearn.metrics import confusion_matrix

    counts: Array = confusion_matrix(labels, scores.argmax(1), labels=np.arange(classes))
    return counts


def recall_precision(counts: Array) -> tuple[Array, Array]:
    """Return (K,) recall and precision of every class from a confusion matrix, NaN where nothing was counted."""
    hits = np.diag(counts).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return hits / counts.sum(1), hits / counts.sum(0)
