# SPDX-License-Identifier: Apache-2.0
"""An encoder that says the same of every token is noticed, and a run with one says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import encoders
import pytest
import runs
import steps
import torch
from torch import nn

from masktrain.models.pretrainer import Encoded
from masktrain.recipes import find
from masktrain.training import checkpoint
from masktrain.training.validation import Validator


def validator(name: str) -> Validator:
    recipe = find(name, "tiny")
    recipe = replace(recipe, model=replace(recipe.model, encoder_layers=2))
    return Validator(steps.new_step(recipe), [encoders.batch((0.7, 1.1, 0.9))], ["a", "b", "c"], 0)


def flatten(state: dict[str, torch.Tensor], prefix: str) -> None:
    """Leave nothing of the encoder's norms but a bias: each layer, or the last norm, ends in a constant."""
    for name, tensor in state.items():
        if name.startswith(prefix) and "norm" in name:
            tensor.fill_(0.0 if name.endswith("weight") else 1.0)


@pytest.mark.parametrize("name", encoders.RECIPES)
def test_random_weights_are_told_from_a_constant_encoder(name: str) -> None:
    held_out = validator(name)
    model = held_out.step.model.train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    spread = held_out.encoder_spread()
    assert spread is not None and 0.02 < spread < 1
    assert held_out.encoder_spread() == spread and model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    with torch.no_grad():
        flatten(dict(model.named_parameters()), "encoder.")
    collapsed = held_out.encoder_spread()
    assert collapsed is not None and collapsed < 1e-10


def test_the_spread_is_variance_over_mean_square() -> None:
    """Tokens of +3 and of 1 around a mean of 2: variance 1, mean square 5. All zeros are a constant as well."""
    held_out = validator("maskspec")
    visible = held_out.plans[0][-1].n_visible
    values = torch.ones(sum(visible), held_out.step.model.encoder.config.width)
    assert len(values) % 2 == 0
    values[::2] = 3.0

    class Fixed(nn.Module):
        encoder = held_out.step.model.encoder

        def encoded(self, *_: object) -> dict[int, Encoded]:
            return {2: Encoded(values, values[:0])}

    held_out.step.model = Fixed()  # type: ignore[assignment]
    assert held_out.encoder_spread() == 0.2
    values.zero_()
    assert held_out.encoder_spread() == 0.0
    values = values[:1]
    assert held_out.encoder_spread() is None


def test_a_run_that_stays_collapsed_says_so_once(tmp_path: Path) -> None:
    clips = runs.make_clips(tmp_path / "audio", 24)
    shared = ["run", "--recipe", "mae_ast_frame", *runs.SMALL, "--data", clips]
    done = runs.masktrain(*shared, "--steps", "2", "--out", tmp_path / "first")
    assert done.returncode == 0, done.stderr
    assert "has collapsed" not in done.stdout + done.stderr
    assert json.loads((tmp_path / "first" / "summary.json").read_text())["encoder_spread"] > 0.02
    saved = checkpoint.latest(tmp_path / "first" / "checkpoints").checkpoint
    assert saved is not None
    flatten(saved.tensors["model"], "encoder.")
    checkpoint.save(tmp_path / "flat" / "checkpoints", 2, saved.tensors, saved.data, keep_last=1)

    after = ["--init-from", tmp_path / "flat", "--optim.lr", "1e-9", "--steps", "4"]
    done = runs.masktrain(*shared, *after, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert said.count("the encoder says the same of every token") == 1
    assert "after 1 steps" in said and "--optim.lr" in said and "its weights are of no use" in said
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["encoder_spread"] < 1e-6


def test_resuming_a_finished_run_keeps_what_its_summary_says(tmp_path: Path) -> None:
    """The spread is measured again, and the seconds are those of all processes of the run."""
    clips = runs.make_clips(tmp_path / "audio", 24)
    run = tmp_path / "run"
    done = runs.masktrain(
        "run", "--recipe", "mae_ast_frame", *runs.SMALL, "--data", clips, "--steps", "2", "--out", run
    )
    assert done.returncode == 0, done.stderr
    spread = json.loads((run / "summary.json").read_text())["encoder_spread"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["elapsed_s"] = 5000.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = runs.masktrain("run", "--resume", run)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["encoder_spread"] == spread > 0.02
    assert 5000 < summary["seconds"] < 5200
