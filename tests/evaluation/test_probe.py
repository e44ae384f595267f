# SPDX-License-Identifier: Apache-2.0
"""The batched probe: against torch's own layers one run at a time, alone and in company, heads, splits, mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from masktrain.errors import ConfigError, DataError
from masktrain.evaluation import probe
from masktrain.evaluation.probe import (
    AttentiveHead,
    Epoch,
    Fit,
    LinearHead,
    ProbeConfig,
    Run,
    WeightedHead,
    inner_split,
    train,
)

Array = NDArray[Any]
LAYERS, CLIPS, WIDTH, CLASSES = 3, 240, 12, 4


def data(multi: bool, seed: int = 0) -> tuple[Tensor, Array]:
    """Features of three layers, the last the most telling, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, CLIPS)
    centres = rng.normal(size=(CLASSES, WIDTH))
    noise = rng.normal(size=(LAYERS, CLIPS, WIDTH))
    signal = np.array([0.1, 0.4, 0.8])[:, None, None] * centres[labels]
    features = torch.tensor(3 * (signal + noise) + 5, dtype=torch.float32)
    if multi:
        other = rng.integers(0, CLASSES, CLIPS)
        return features, (np.eye(CLASSES)[labels] + np.eye(CLASSES)[other] > 0).astype(np.uint8)
    return features, labels


def some_runs(layers: int = LAYERS) -> list[Run]:
    """Runs of unequal sizes, some with and some without a validation part."""
    rows = np.random.default_rng(5).permutation(CLIPS)
    parts = [
        (rows[:150], None, rows[150:]),
        (rows[60:], None, rows[:60]),
        (rows[:90], rows[90:120], rows[120:]),
    ]
    return [
        Run(a, b, c, seed=seed, split=number, layer=layer, lr=lr)
        for layer in range(layers)
        for seed in (1, 2)
        for number, (a, b, c) in enumerate(parts)
        for lr in (1e-2, 1e-3)
    ]


def assert_same(one: Fit, other: Fit, tolerance: float = 1e-5) -> None:
    assert (one.best_epoch, one.epochs_run, one.score) == (other.best_epoch, other.epochs_run, other.score)
    np.testing.assert_allclose(one.outputs, other.outputs, atol=tolerance)


@pytest.mark.parametrize("multi", [False, True], ids=["accuracy", "mAP"])
def test_steps_are_those_of_torchs_linear_and_adam(multi: bool) -> None:
    """One run, epoch by epoch, with nn.Linear, torch's losses and torch.optim.Adam on the same batches."""
    features, labels = data(multi)
    rows = np.arange(CLIPS)
    run = Run(rows[:130], rows[130:180], rows[180:], seed=3, layer=1, lr=5e-3)
    kept: list[tuple[float, Tensor]] = []
    config = ProbeConfig(epochs=4, batch_size=50, weight_decay=0.1)

    def keep(epoch: Epoch) -> None:
        kept.append((float(epoch.train_loss[0]), epoch.parameters["weight"][0].clone()))

    train(LinearHead(features), labels, CLASSES, [run], config, keep)
    words = np.random.SeedSequence([run.seed, run.split]).generate_state(2)
    stream = torch.Generator().manual_seed(int(words[1]))
    layer = nn.Linear(WIDTH, CLASSES)
    with torch.no_grad():
        bound = WIDTH**-0.5
        layer.weight.copy_((2 * torch.rand(CLASSES, WIDTH, generator=stream) - 1) * bound)
        layer.bias.copy_((2 * torch.rand(CLASSES, generator=stream) - 1) * bound)
    x = features[1]
    x = (x - x[:130].mean(0)) / x[:130].std(0, correction=0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3, weight_decay=0.1)
    for expected_loss, expected_weight in kept:
        order = torch.randperm(130, generator=stream)
        losses = []
        for batch in order.split(50):
            logits, target = layer(x[batch]), torch.from_numpy(labels)[batch]
            if multi:
                loss = nn.functional.binary_cross_entropy_with_logits(logits, target.float())
            else:
                loss = nn.functional.cross_entropy(logits, target) / CLASSES
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert np.mean(losses) == pytest.approx(expected_loss, rel=1e-5)
        torch.testing.assert_close(layer.weight.detach(), expected_weight, atol=2e-6, rtol=0)


@pytest.mark.parametrize("multi", [False, True], ids=["accuracy", "mAP"])
def test_a_run_does_not_depend_on_its_company(multi: bool) -> None:
    features, labels = data(multi)
    runs = some_runs()
    config = ProbeConfig(epochs=30, patience=4, batch_size=64)
    together = train(LinearHead(features), labels, CLASSES, runs, config)
    assert len({fit.epochs_run for fit in together}) > 3, "runs must end at different times"
    for place in (0, 5, 17, 35):
        (alone,) = train(LinearHead(features), labels, CLASSES, [runs[place]], config)
        assert_same(alone, together[place])


def test_groups_that_do_not_fit_together_are_trained_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, labels = data(False)
    runs = some_runs(layers=1)
    config = ProbeConfig(epochs=5)
    whole = train(LinearHead(features), labels, CLASSES, runs, config)
    places: list[int] = []
    monkeypatch.setattr(probe, "GROUP_BYTES", 5 * 180 * 4 * WIDTH)

    def first_epoch(epoch: Epoch) -> None:
        places.extend(epoch.runs if epoch.number == 0 else [])

    parts = train(LinearHead(features), labels, CLASSES, runs, config, first_epoch)
    assert places == list(range(len(runs)))
    for one, other in zip(parts, whole, strict=True):
        assert_same(one, other)


def test_best_epoch_and_patience() -> None:
    """The kept epoch is the best by validation metric, then by validation loss; the run ends `patience` later."""
    features, labels = data(False)
    rows = np.arange(CLIPS)
    run = Run(rows[:60], rows[60:90], rows[90:], seed=0, layer=0, lr=0.05)
    metrics: list[float] = []
    weights: list[Tensor] = []

    def keep(epoch: Epoch) -> None:
        metrics.append(float(epoch.valid[0]))
        weights.append(epoch.parameters["weight"][0].clone())

    (fit,) = train(LinearHead(features), labels, CLASSES, [run], ProbeConfig(epochs=100, patience=7), keep)
    assert fit.epochs_run == len(metrics) < 100
    assert metrics[fit.best_epoch] == max(metrics) == fit.valid
    assert fit.epochs_run - 1 - fit.best_epoch == 7
    assert torch.equal(fit.parameters["weight"], weights[fit.best_epoch])
    # EVAR's: the last epoch of the best value, and equal values do not count as waiting
    metrics.clear()
    config = ProbeConfig(epochs=100, patience=7, evar_compat=True)
    (fit,) = train(LinearHead(features), labels, CLASSES, [run], config, keep)
    last_best = max(n for n, value in enumerate(metrics) if value == max(metrics))
    assert (fit.best_epoch, fit.epochs_run) == (last_best, min(100, last_best + 8))


def test_scaler_sees_the_validation_part_only_with_compat() -> None:
    features, labels = data(False)
    features[0, 100:] += 1000.0
    run = Run(np.arange(200), None, np.arange(200, 240), seed=0)
    for compat in (False, True):
        seen: list[Array] = []

        class Watched(LinearHead):
            def constants(self, runs: Any, fitted_on: Any) -> Any:
                seen.extend(fitted_on)  # noqa: B023
                return super().constants(runs, fitted_on)

        train(Watched(features), labels, CLASSES, [run], ProbeConfig(epochs=1, evar_compat=compat))
        assert len(seen[0]) == (200 if compat else 180)


def test_weighted_head_finds_the_telling_layer() -> None:
    features, labels = data(False)
    rows = np.random.default_rng(2).permutation(CLIPS)
    run = Run(rows[:160], None, rows[160:], seed=0, lr=2e-2)
    (fit,) = train(WeightedHead(features), labels, CLASSES, [run], ProbeConfig())
    weights = fit.parameters["mix"].softmax(0)
    assert weights.argmax() == 2 and weights[2] > 0.5 and weights[0] < weights[1]
    (first,) = train(LinearHead(features), labels, CLASSES, [run], ProbeConfig())
    assert fit.score > first.score + 0.2


def tokens_of(labels: Array, telling: bool) -> tuple[Tensor, list[int]]:
    """Clips of 3 to 9 tokens; one of them is of the class where `telling`, marked by its first value."""
    rng = np.random.default_rng(7)
    centres = rng.normal(size=(CLASSES, WIDTH)) * 2
    counts = rng.integers(3, 10, len(labels))
    parts = []
    for label, number in zip(labels, counts, strict=True):
        tokens = rng.normal(size=(number, WIDTH))
        tokens[:, 1:] += centres[rng.integers(0, CLASSES, number), 1:]
        tokens[:, 0] = 0.0
        if telling:
            place = rng.integers(number)
            tokens[place] = centres[label] + 0.3 * rng.normal(size=WIDTH)
            tokens[place, 0] = 6.0
        parts.append(tokens)
    return torch.tensor(np.concatenate(parts), dtype=torch.float32), [0, *np.cumsum(counts).tolist()]


def test_attentive_head_starts_as_the_linear_one_on_means() -> None:
    _, labels = data(False)
    tokens, cu = tokens_of(labels, telling=False)
    head = AttentiveHead(tokens, cu)
    means = torch.stack([tokens[a:b].mean(0) for a, b in itertools.pairwise(cu)])[None]
    run = Run(np.arange(200), None, np.arange(200, 240), seed=0, lr=1e-12)
    config = ProbeConfig(epochs=1)
    (ours,) = train(head, labels, CLASSES, [run], config)
    (plain,) = train(LinearHead(means), labels, CLASSES, [run], config)
    np.testing.assert_allclose(ours.outputs, plain.outputs, atol=1e-5)


def test_attentive_head_finds_the_telling_token() -> None:
    _, labels = data(False)
    tokens, cu = tokens_of(labels, telling=True)
    head = AttentiveHead(tokens, cu)
    run = Run(np.arange(180), None, np.arange(180, 240), seed=0, lr=2e-2)
    (fit,) = train(head, labels, CLASSES, [run], ProbeConfig())
    (plain,) = train(LinearHead(head.means[None]), labels, CLASSES, [run], ProbeConfig())
    assert fit.score > plain.score + 0.1
    assert fit.score > 0.9


@pytest.mark.parametrize("multi", [False, True], ids=["accuracy", "mAP"])
def test_inner_split_is_a_partition_with_every_class(multi: bool) -> None:
    _, labels = data(multi)
    rows = np.random.default_rng(3).permutation(CLIPS)[:200]
    drawn = set()
    for seed in range(20):
        kept, valid = inner_split(labels, rows, 0.1, seed)
        assert sorted([*kept, *valid]) == sorted(rows) and len(valid) == 20
        own = labels[valid]
        assert (own.any(0) if multi else np.bincount(own, minlength=CLASSES)).all()
        drawn.add(tuple(valid))
        again = inner_split(labels, rows, 0.1, seed)
        assert np.array_equal(again[1], valid)
    assert len(drawn) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels * 0, "1 classes; a classifier needs two"),
        (lambda labels: labels, "no test clips"),
    ],
)
def test_what_cannot_be_trained_is_refused(change: Callable[[Array], Array], message: str) -> None:
    features, labels = data(False)
    test = np.arange(0) if "test" in message else np.arange(100, 240)
    run = Run(np.arange(100), None, test, seed=0)
    with pytest.raises(DataError, match=message):
        train(LinearHead(features), change(labels), CLASSES, [run], ProbeConfig())


@pytest.mark.parametrize("name", ["epochs", "patience", "batch_size", "valid_share", "weight_decay"])
def test_config_refuses_what_means_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: .*received -1"):
        ProbeConfig(**{name: -1})
