# SPDX-License-Identifier: Apache-2.0
"""The plain transcriptions that a step is timed against compute the step's own loss and gradients."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from masktrain.recipes import find
from masktrain.training.recipe import Recipe

REPO = Path(__file__).resolve().parents[2]
CASES = ("audiomae", "mae_ast_frame", "mae_ast_patch", "maskspec", "msm_mae", "ssast_frame", "ssast_patch")


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/plain/pair.py; the folder is no part of the package."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(REPO)])
    from benchmarks.plain import pair

    return pair


def small(name: str, **changes: Any) -> Recipe:
    recipe = find(name, "tiny")
    changes = {"encoder_layers": 2, "encoder_layerdrop": 0.0, **changes}
    known = {field: value for field, value in changes.items() if hasattr(recipe.model, field)}
    return replace(recipe, model=replace(recipe.model, **known))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_agree(pair: ModuleType, name: str) -> None:
    columns = 128 // find(name).grid.patch_time  # of SSAST's learned positions
    ours = pair.Ours(small(name, columns=columns), 3, 128, torch.float64)
    agree(pair, ours, pair.Plain(ours))


@pytest.mark.parametrize("name", ["maskspec", "audiomae"])
def test_other_targets_and_more_layers(pair: ModuleType, name: str) -> None:
    """Four decoder layers, two of them shifted; targets that are not standardised."""
    recipe = small(name, decoder_layers=4)
    recipe = replace(recipe, objective=replace(recipe.objective, norm_pix_loss=False))
    ours = pair.Ours(recipe, 2, 192, torch.float64)
    agree(pair, ours, pair.Plain(ours))


def test_one_pass_is_two_under_one_mask(pair: ModuleType) -> None:
    ours = pair.Ours(small("ssast_patch", columns=8, passes=1), 2, 128, torch.float64)
    agree(pair, ours, pair.Plain(ours))
    other = pair.Plain(ours, second_mask=True)
    assert not torch.equal(other.arguments[1], other.arguments[2])
    assert float((other.loss() - ours.loss()).detach().abs()) > 1e-6


def agree(pair: ModuleType, ours: Any, plain: Any) -> None:
    """Loss, and the gradient of every parameter."""
    losses = [side.loss(dropout=False) for side in (ours, plain)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-10)
    gradients = {name: p.grad for name, p in ours.model.named_parameters()}
    export = {
        "Mae": lambda g: pair.mae.export_state(g, ours.recipe.grid),
        "MaeAst": pair.mae_ast.export_state,
        "Ssast": lambda g: pair.ssast.export_state(g, ours.recipe.grid),
    }[type(ours.model).__name__](gradients)
    theirs = {name: p.grad for name, p in plain.model.named_parameters()}
    assert export.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert float((export[name] - gradient).abs().max()) < 1e-9 * (1 + float(gradient.abs().max())), name


@pytest.mark.parametrize("name", ["mae_ast_frame", "audiomae"])
def test_dropout_is_on_in_both(pair: ModuleType, name: str) -> None:
    ours = pair.Ours(small(name, position_dropout=0.5), 2, 64)
    for side in (ours, pair.Plain(ours)):
        without = side.loss(dropout=False).item()
        assert side.loss(dropout=False).item() == without
        assert side.loss().item() != without
