# SPDX-License-Identifier: Apache-2.0
"""One training step with each implementation of the ops forced in turn: which ones ran, and that they compute the same."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from masktrain.kernels import _dispatch, _native, _triton
from masktrain.kernels._dispatch import Choice, Implementation
from masktrain.kernels.block_marks import op as block_marks
from masktrain.kernels.dropout import op as dropout
from masktrain.kernels.log_mel import op as log_mel
from masktrain.kernels.mask_gather import op as mask_gather
from masktrain.kernels.mask_scatter import op as mask_scatter
from masktrain.kernels.masked_patch_loss import op as masked_patch_loss
from masktrain.kernels.patch_info_nce import op as patch_info_nce
from masktrain.kernels.philox import op as philox
from masktrain.kernels.resample import op as resample
from masktrain.kernels.select_tokens import op as select_tokens
from masktrain.kernels.varlen_attention import op as varlen_attention
from masktrain.kernels.window_attention import op as window_attention
from masktrain.models import registry
from masktrain.recipes import find
from masktrain.training import optim, precision, schedule
from masktrain.training.distributed import World
from masktrain.training.step import Step
from masktrain.types import AudioBatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The ops of a step of two recipes, which between them have every op of a reconstruction recipe.
SHARED: dict[str, tuple[Implementation, ...]] = {
    "log_mel": log_mel.IMPLEMENTATIONS,
    "mask_gather": mask_gather.IMPLEMENTATIONS,
    "mask_scatter": mask_scatter.IMPLEMENTATIONS,
    "masked_patch_loss": masked_patch_loss.IMPLEMENTATIONS,
    "philox_words": philox.IMPLEMENTATIONS,
    "resample": resample.IMPLEMENTATIONS,
    "select_tokens": select_tokens.IMPLEMENTATIONS,
    "varlen_attention": varlen_attention.IMPLEMENTATIONS,
}
IMPLEMENTATIONS: dict[str, dict[str, tuple[Implementation, ...]]] = {
    "mae_ast_patch": {
        **SHARED,
        "block_marks": block_marks.IMPLEMENTATIONS,
        "dropout": dropout.DROPOUT,
        "patch_info_nce": patch_info_nce.IMPLEMENTATIONS,
    },
    "audiomae": {**SHARED, "window_attention": window_attention.IMPLEMENTATIONS},
}
# Ops inside of these: a fused implementation does not come to them.
INNER = {"philox_words", "dropout"}


@cache
def one_step(name: str, implementation: str) -> tuple[dict[str, torch.Tensor], tuple[Choice, ...]]:
    """Return loss, gradient norm and new weights of one step, and the choices that were made in it."""
    recipe = find(name, "tiny")
    widths = {"embed_dim": 32, "ffn_dim": 64, "heads": 2}
    sizes: dict[str, Any] = {**widths, **{f"decoder_{field}": value for field, value in widths.items()}}
    sizes |= {"encoder_layers": 1, "decoder_layers": 2 if name == "audiomae" else 1}
    if name == "mae_ast_patch":
        sizes["encoder_layerdrop"] = 0.0
    model = replace(recipe.model, **sizes)
    recipe = replace(recipe, model=model, batch_size=3, optim=replace(recipe.optim, eps=1e-4))
    torch.manual_seed(0)
    net = registry.build(recipe.model, recipe.grid, recipe.input_norm).to(DEVICE)
    optimizer, world = optim.build(net, recipe.optim, 1e-3), World(0, 1, DEVICE, None)
    step = Step(
        recipe,
        net,
        optimizer,
        schedule.resolve(recipe.schedule, 2, 1e-3),
        world,
        precision.choose("fp32", DEVICE),
    )
    lengths, rates = (9000, 5000, 9001), (16000, 16000, 20000)
    noise = 0.1 * np.random.default_rng(0).standard_normal(sum(lengths)).astype(np.float32)
    ids = torch.arange(3)
    audio = AudioBatch(torch.from_numpy(noise), lengths, rates, ids, torch.zeros_like(ids))
    before = _dispatch.chosen()
    _dispatch.record(())
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(_dispatch.ENV, implementation)
            result = step(0, [audio])
        choices = _dispatch.chosen()
    finally:
        _dispatch.record(before)
    out = {"loss": result.loss, "grad_norm": result.grad_norm, **net.state_dict()}
    return {key: value.detach().cpu().double() for key, value in out.items()}, choices


def why_not(implementation: str) -> str | None:
    if implementation == "native":
        return "the native library serves the CPU" if DEVICE.type == "cuda" else _native.why_not()
    return _triton.why_not(torch.zeros(0, device=DEVICE)) if implementation == "triton" else None


@pytest.mark.parametrize("implementation", _dispatch.NAMES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_step_runs_what_was_asked_for(name: str, implementation: str) -> None:
    if why_not(implementation):
        pytest.skip(str(why_not(implementation)))
    _, choices = one_step(name, implementation)
    ran = {op: {c.name for c in choices if c.op == op} for op in IMPLEMENTATIONS[name]}
    for op, known in IMPLEMENTATIONS[name].items():
        if implementation in {i.name for i in known}:
            assert ran[op] == {implementation} or (op in INNER and not ran[op]), op
        else:
            assert ran[op] and implementation not in ran[op], op
    asked = {op for op, names in ran.items() if names == {implementation}}
    shared = {"log_mel", "mask_gather", "mask_scatter", "masked_patch_loss", "resample", "select_tokens"}
    least = {
        "triton": {**dict.fromkeys(IMPLEMENTATIONS, shared)},
        "native": {**dict.fromkeys(IMPLEMENTATIONS, shared)},
        "reference": {each: set(ops) for each, ops in IMPLEMENTATIONS.items()},
    }
    if name == "mae_ast_patch":
        least["triton"][name] = shared | {"block_marks", "dropout", "patch_info_nce", "varlen_attention"}
        least["native"][name] = shared | {"block_marks", "dropout", "varlen_attention"}
    elif implementation == "native":
        least["native"][name] = shared | {"window_attention"}
    assert asked >= least[implementation][name]


@pytest.mark.parametrize("implementation", ["native", "triton"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_step_computes_the_same(name: str, implementation: str) -> None:
    if why_not(implementation):
        pytest.skip(str(why_not(implementation)))
    got, want = one_step(name, implementation)[0], one_step(name, "reference")[0]
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert float((got[key] - value).abs().max()) <= 1e-5 * (1 + float(value.abs().max())), key
