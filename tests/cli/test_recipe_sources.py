# SPDX-License-Identifier: Apache-2.0
"""Where the values of a recipe are from: every source belongs to a value, and `recipes show` prints it there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import runs

from masktrain.config import flatten
from masktrain.recipes import RECIPES, SIZES, find


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_source_belongs_to_a_value(name: str, size: str) -> None:
    recipe = find(name, size)
    flat = flatten(recipe)
    named = [field for field, _ in recipe.sources]
    assert len(named) == len(set(named))
    for field, source in recipe.sources:
        assert source.strip(), field
        # a group stands for all of its values
        assert field in flat or any(other.startswith(f"{field}.") for other in flat), field


def test_the_innermost_source_counts() -> None:
    recipe = replace(find("mae_ast_frame"), sources=(("optim", "group"), ("optim.betas", "own")))
    assert recipe.source("optim.betas") == "own"
    assert recipe.source("optim.lr") == "group"
    assert recipe.source("schedule.kind") == recipe.source("optimiser") == ""


def test_show_prints_the_source_beside_the_value(tmp_path: Path) -> None:
    path = tmp_path / "show.json"
    done = runs.masktrain("recipes", "show", "mae_ast_patch", "--json", path)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for field, source in (
        ("schedule.warmup_steps", "32000 AlanBaade/MAE-AST-Public:config/pretrain/mae_ast.yaml"),
        ("frontend.mel.window", "povey defaults of pytorch/audio:torchaudio/compliance/kaldi.py, fbank"),
        ("masking.sides", "[3, 4, 5] AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py: chunks"),
    ):
        assert source in " ".join(lines[field].split())
    stored = dict(json.loads(path.read_text())["sources"])
    assert stored == dict(find("mae_ast_patch").sources)


def test_values_of_a_smaller_size_are_not_laid_at_the_publication() -> None:
    done = runs.masktrain("recipes", "show", "mae_ast_frame:tiny")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert (
        "size tiny of this project" in lines["optim.lr"]
        and "size tiny of this project" in lines["model.heads"]
    )
    assert "mae_ast.yaml" in lines["optim.betas"]
