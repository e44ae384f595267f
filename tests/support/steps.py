# SPDX-License-Identifier: Apache-2.0
"""A training step of a recipe, as a run on one CPU has it."""

from __future__ import annotations

import torch

from masktrain.models import registry
from masktrain.training import optim, precision, schedule
from masktrain.training.distributed import World
from masktrain.training.recipe import Recipe
from masktrain.training.step import Step


def new_step(recipe: Recipe, steps: int = 4) -> Step:
    """Return a step with random weights and, where the input norm has them, random statistics of the mel bins."""
    torch.manual_seed(0)
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    if recipe.input_norm.kind == "per_bin":
        bins = recipe.frontend.n_mels
        model.input_norm.set_bins(torch.randn(bins), 0.5 + torch.rand(bins))
    world = World(0, 1, torch.device("cpu"), None)
    return Step(
        recipe,
        model,
        optim.build(model, recipe.optim, 1e-3),
        schedule.resolve(recipe.schedule, steps, 1e-3),
        world,
        precision.choose("fp32", world.device),
    )
