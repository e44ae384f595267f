# SPDX-License-Identifier: Apache-2.0
"""The probe against EVAR's own classifier: the deterministic runs step by step, the others in distribution."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.evaluation.probe import Epoch, Fit, LinearHead, ProbeConfig, Run, train

Array = NDArray[Any]
COMPAT = ProbeConfig(evar_compat=True)
SETTINGS = ("single_lr0.0003", "single_lr0.02", "multi_lr0.0003", "multi_lr0.02")


class GivenStart(LinearHead):
    """A linear head that starts from stored weights."""

    def __init__(self, features: Tensor, starts: Sequence[tuple[Array, Array]]) -> None:
        super().__init__(features)
        self.starts = starts

    def initial(
        self, runs: Sequence[Run], classes: int, generators: Sequence[torch.Generator]
    ) -> dict[str, Tensor]:
        return {
            "weight": torch.stack([torch.from_numpy(weight) for weight, _ in self.starts]),
            "bias": torch.stack([torch.from_numpy(bias) for _, bias in self.starts]),
        }


def load(golden_dir: Path, case: str) -> tuple[Mapping[str, Array], dict[str, Any]]:
    arrays = dict(np.load(golden_dir / "evar" / f"{case}.npz"))
    return arrays, json.loads((golden_dir / "evar" / f"{case}.json").read_text())


def features_of(stored: Array) -> Tensor:
    return torch.from_numpy(stored.astype(np.float32) / 64)[None]


@pytest.mark.parametrize("setting", SETTINGS)
def test_trajectory_is_evars(golden_dir: Path, setting: str) -> None:
    arrays, about = load(golden_dir, "A_exact")
    kind, lr = setting.split("_lr")
    expected = about["settings"][setting]
    run = Run(
        train=arrays[f"{kind}/train_idx"],
        valid=arrays[f"{kind}/valid_idx"],
        test=arrays[f"{kind}/test_idx"],
        seed=0,
        lr=float(lr),
    )
    start = (arrays[f"{setting}/init_weight"], arrays[f"{setting}/init_bias"])
    head = GivenStart(features_of(arrays[f"{kind}/features_x64"]), [start])
    scaler = head.constants([run], [run.train])
    np.testing.assert_allclose(scaler["mean"][0], arrays[f"{kind}/scaler_mean"], rtol=1e-6)
    np.testing.assert_allclose(scaler["scale"][0], arrays[f"{kind}/scaler_scale"], rtol=1e-6)
    losses, metrics = [], []

    def compare(epoch: Epoch) -> None:
        losses.append(float(epoch.train_loss[0]))
        metrics.append(float(epoch.valid[0]))
        if (number := epoch.number + 1) in (1, 2, 10):
            for name in ("weight", "bias"):
                stored = arrays[f"{setting}/{name}_after_{number}"]
                np.testing.assert_allclose(epoch.parameters[name][0], stored, atol=1e-6, rtol=0)

    (fit,) = train(head, arrays[f"{kind}/labels"], 10, [run], COMPAT, compare)
    assert (fit.best_epoch, fit.epochs_run) == (expected["best_epoch"], expected["epochs_run"])
    np.testing.assert_allclose(losses, arrays[f"{setting}/train_loss"], rtol=1e-5)
    # the accuracy of a validation part is a count: exact; average precision follows the order of rounded scores
    metric_tolerance = 1e-9 if kind == "single" else 1e-3
    np.testing.assert_allclose(metrics, arrays[f"{setting}/val_metric"], atol=metric_tolerance, rtol=0)
    assert fit.score == pytest.approx(expected["test_score"], abs=metric_tolerance)
    np.testing.assert_allclose(fit.parameters["weight"], arrays[f"{setting}/weight_best"], atol=5e-6, rtol=0)
    np.testing.assert_allclose(fit.parameters["bias"], arrays[f"{setting}/bias_best"], atol=5e-6, rtol=0)
    np.testing.assert_allclose(fit.outputs, arrays[f"{setting}/test_outputs"], atol=2e-5, rtol=0)


def test_saturated_sigmoids_are_behind_the_switch(golden_dir: Path) -> None:
    """Of weights so large that float32 sigmoids reach 1.0, EVAR's answer is the first class that does; ours the logits'."""
    arrays, _ = load(golden_dir, "A_exact")
    rows = {part: arrays[f"single/{part}_idx"] for part in ("train", "valid", "test")}
    run = Run(**rows, seed=0, lr=1e-12)
    weight, bias = (4 * arrays[f"single_lr0.02/{name}_best"] for name in ("weight", "bias"))
    features = arrays["single/features_x64"] / 64
    x = (features[rows["test"]] - arrays["single/scaler_mean"]) / arrays["single/scaler_scale"]
    logits = x @ weight.T.astype(np.float64) + bias
    saturated = np.where(logits > 17.4, 1.0, 1 / (1 + np.exp(-logits)))
    truth = arrays["single/labels"][rows["test"]]
    expected = {True: (saturated.argmax(1) == truth).mean(), False: (logits.argmax(1) == truth).mean()}
    assert expected[True] != expected[False], "nothing saturates: the case tests nothing"
    head = GivenStart(features_of(arrays["single/features_x64"]), [(weight, bias)])
    for compat in (True, False):
        config = ProbeConfig(epochs=1, evar_compat=compat)
        assert train(head, arrays["single/labels"], 10, [run], config)[0].score == expected[compat]


def parts(arrays: Mapping[str, Array], case: str) -> list[tuple[Array, Array | None, Array]]:
    if case == "A_esc10":
        fold = arrays["fold"]
        return [(np.flatnonzero(fold != k), None, np.flatnonzero(fold == k)) for k in np.unique(fold)]
    part = arrays["part"]
    valid = np.flatnonzero(part == 1)
    return [(np.flatnonzero(part == 0), valid if valid.size else None, np.flatnonzero(part == 2))]


def fits_of(arrays: Mapping[str, Array], case: str, lr: float, seeds: int) -> list[Fit]:
    runs = [
        Run(train=a, valid=b, test=c, seed=seed, split=number, lr=lr)
        for seed in range(1000, 1000 + seeds)
        for number, (a, b, c) in enumerate(parts(arrays, case))
    ]
    return train(LinearHead(features_of(arrays["features_x64"])), arrays["labels"], 10, runs, COMPAT)


def check_distribution(golden_dir: Path, case: str, lr: str, seeds: int) -> None:
    arrays, about = load(golden_dir, case)
    fits = fits_of(arrays, case, float(lr), seeds)
    scores = np.array([fit.score for fit in fits]).reshape(seeds, -1).mean(1)
    peer = about["results"][f"lr{lr}"]
    error = math.hypot(scores.std(ddof=1) / math.sqrt(seeds), peer["standard_error_all_seeds"])
    assert abs(scores.mean() - peer["mean_all_seeds"]) < 4 * error, (scores.mean(), peer, error)
    # how long the runs train is told apart more sharply than what they score
    epochs = np.array([fit.epochs_run for fit in fits], dtype=float)
    stored = arrays[f"lr{lr}/epochs_run"].astype(float)
    spread = math.hypot(
        epochs.std(ddof=1) / math.sqrt(epochs.size), stored.std(ddof=1) / math.sqrt(stored.size)
    )
    assert abs(epochs.mean() - stored.mean()) <= 4 * spread + 1e-9


@pytest.mark.parametrize(
    ("case", "lr"), [("A_esc10", "0.0003"), ("A_esc10", "3e-05"), ("A_multilabel", "3e-05")]
)
def test_ten_seeds_reach_what_evar_reaches(golden_dir: Path, case: str, lr: str) -> None:
    check_distribution(golden_dir, case, lr, seeds=10)


@pytest.mark.slow(covers=["masktrain/evaluation/probe.py", "masktrain/evaluation/metrics.py"])
@pytest.mark.parametrize("case", ["A_esc10", "A_fsdd_digit", "A_multilabel"])
@pytest.mark.parametrize("lr", ["0.0003", "3e-05"])
def test_forty_seeds_reach_what_evar_reaches(golden_dir: Path, case: str, lr: str) -> None:
    check_distribution(golden_dir, case, lr, seeds=40)
