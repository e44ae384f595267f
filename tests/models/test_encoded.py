# SPDX-License-Identifier: Apache-2.0
"""The encoder's layers, as masking and evaluation read them, against the forward pass of training."""

from __future__ import annotations

import pytest
import torch

from masktrain.masking.plan import unmasked
from masktrain.models import registry
from masktrain.recipes import find
from masktrain.types import Spectrogram, StepKey, cumulative

RECIPES = ("mae_ast_frame", "mae_ast_patch", "ssast_patch", "maskspec", "msm_mae", "msm_mae_orig", "audiomae")


def problem(name: str):
    recipe = find(name, "tiny")
    torch.manual_seed(1)
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm).double().eval()
    lengths = (160, 96, 208)
    frames = torch.randn(sum(lengths), recipe.frontend.n_mels, dtype=torch.float64)
    batch = Spectrogram(frames, lengths, cumulative(lengths, torch.int64, "cpu"), torch.tensor([4, 7, 1]))
    mean, scale = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    return recipe, model, batch, recipe.grid.layout(batch), mean, scale


@pytest.mark.parametrize("name", RECIPES)
def test_last_layer_is_the_encoder_of_training(name: str) -> None:
    recipe, model, batch, layout, mean, scale = problem(name)
    key = StepKey.make(3, 5, "cpu")
    plan = recipe.masking.plan(layout, key)
    last = model.encoder.config.layers
    encoded = model.encoded(batch, plan, mean, scale, (last,))[last]
    if model.config.masks == 2:
        whole = model.encode(batch, (plan,), mean, scale)
        counts = layout.lengths
    else:
        whole = model.encode(batch, plan, mean, scale, None)
        counts = plan.n_visible
    leading = encoded.leading.shape[1]
    assert leading == {"ssast_patch": 2, "mae_ast_frame": 0, "mae_ast_patch": 0}.get(name, 1)
    start = 0
    tokens = encoded.tokens.split(list(counts))
    for clip, n in enumerate(counts):
        assert torch.equal(encoded.leading[clip], whole[start : start + leading])
        assert torch.equal(tokens[clip], whole[start + leading : start + leading + n])
        start += leading + n


@pytest.mark.parametrize("name", ("mae_ast_patch", "ssast_patch", "maskspec"))
def test_an_early_layer_alone_is_that_of_all_layers(name: str) -> None:
    _, model, batch, layout, mean, scale = problem(name)
    plan = unmasked(layout)
    count = model.encoder.config.layers
    every = model.encoded(batch, plan, mean, scale, range(1, count + 1))
    assert sorted(every) == list(range(1, count + 1))
    assert all(len(layer.tokens) == sum(layout.lengths) for layer in every.values())
    for layer in (1, count - 1, count):
        alone = model.encoded(batch, plan, mean, scale, (layer,))[layer]
        assert torch.equal(alone.tokens, every[layer].tokens)
        assert torch.equal(alone.leading, every[layer].leading)
    # layers differ: nothing returns one and the same
    assert not torch.allclose(every[1].tokens, every[count].tokens)


@pytest.mark.parametrize("name", ("mae_ast_patch", "ssast_frame", "maskspec"))
def test_a_clip_does_not_see_its_neighbours(name: str) -> None:
    _, model, batch, layout, mean, scale = problem(name)
    last = model.encoder.config.layers
    whole = model.encoded(batch, unmasked(layout), mean, scale, (last,))[last]
    n = layout.lengths[0]
    alone = Spectrogram(batch.clip(0), batch.lengths[:1], batch.cu_frames[:2], batch.clip_ids[:1])
    one = model.encoded(alone, unmasked(model.grid.layout(alone)), mean, scale, (last,))[last]
    torch.testing.assert_close(one.tokens, whole.tokens[:n], rtol=0, atol=1e-9)
    torch.testing.assert_close(one.leading, whole.leading[:1], rtol=0, atol=1e-9)


def test_unknown_layers_are_refused() -> None:
    _, model, batch, layout, mean, scale = problem("mae_ast_patch")
    for layer in (0, model.encoder.config.layers + 1):
        with pytest.raises(ValueError, match="counted from 1"):
            model.encoded(batch, unmasked(layout), mean, scale, (layer,))
