# SPDX-License-Identifier: Apache-2.0
"""MAE-AST against what the original code computed: every case in the golden data, tensors, losses, gradients,
init."""

from __future__ import annotations

import golden
import pytest
import torch
from golden import Golden, close

from masktrain.models.adapters.mae_ast import config_from_state
from masktrain.models.mae_ast import MaeAst
from masktrain.models.positions import sincos_table
from masktrain.types import LossTerm

# What a case stores beside tensors: inputs, masks and losses, which other tests read.
OTHERS = {"input", "retained_ids", "masked_ids", "loss_recon", "loss_info_nce", "loss"}


@pytest.fixture(params=golden.parameters("mae_ast"))
def case(request: pytest.FixtureRequest) -> Golden:
    return golden.run(request.param)


@pytest.mark.parametrize("name", ["patches", "encoder_out", "decoder_out", "pred_recon", "pred_class"])
def test_tensors(case: Golden, name: str) -> None:
    close(*case.tensors[name])


def test_running_statistics(case: Golden) -> None:
    """The stored running values are those after the one training step, from (0, 1)."""
    norm = case.case.fresh().input_norm
    norm.update(norm.statistics(case.case.spectrogram.frames))
    stored = case.case.model.input_norm
    close(norm.running_mean, stored.running_mean)
    close(norm.running_var, stored.running_var)
    assert torch.equal(stored.running_mean, case.case.state["batch_norm.running_mean"])


def test_positions(case: Golden) -> None:
    for name in ("enc_sine_pos_embed.pe", "dec_sine_pos_embed.pe"):
        table = case.case.state[name][0]
        close(sincos_table(*table.shape), table, 1e-6)


def test_masked_ids(case: Golden) -> None:
    plan, arrays = case.case.plan, case.case.arrays
    masked = plan.masked.view(len(plan.n_masked), -1) - plan.layout.cu_tokens[:-1, None]
    assert torch.equal(masked.long(), arrays["masked_ids"].sort().values)


def test_losses(case: Golden) -> None:
    golden.check_loss(float(case.loss), case.case.record["loss"])
    for ours, theirs in (("mse", "loss_recon"), ("info_nce", "loss_info_nce")):
        got: LossTerm = case.terms[ours]
        golden.check_loss(float(got.sum.detach()) / got.count, float(case.case.arrays[theirs]))


def test_gradient_norms(case: Golden) -> None:
    golden.check_gradient_norms(case)


def test_gradient_sums(case: Golden) -> None:
    golden.check_gradient_sums(case)


def test_weights_round_trip(case: Golden) -> None:
    golden.check_round_trip(case)


def test_nothing_stored_is_left_out(case: Golden) -> None:
    assert case.case.arrays.keys() - case.tensors.keys() <= OTHERS


def test_config_from_weights(case: Golden) -> None:
    model = case.case.model
    assert isinstance(model, MaeAst)
    got = config_from_state(case.case.state, heads=model.config.heads)
    for name in (
        "encoder_layers",
        "embed_dim",
        "ffn_dim",
        "decoder_layers",
        "decoder_embed_dim",
        "decoder_ffn_dim",
    ):
        assert getattr(got, name) == getattr(model.config, name)


def test_initial_weights(case: Golden) -> None:
    golden.check_initial_weights(case)
