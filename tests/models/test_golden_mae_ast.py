# SPDX-License-Identifier: Apache-2.0
"""MAE-AST against what the original code computed: every case in the golden data, tensors, losses, gradients,
init."""

from __future__ import annotations

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from masktrain.kernels.mask_gather import mask_gather
from masktrain.masking.plan import plan_from_ids
from masktrain.models.adapters import IGNORED, config_from_state, export_state, import_state
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae_ast import MaeAst, MaeAstConfig, MaeAstOutput
from masktrain.models.positions import sincos_table
from masktrain.objectives import joint
from masktrain.types import LossTerm, MaskPlan, Spectrogram, TokenGrid, cumulative

REPO = Path(__file__).resolve().parents[2]
ROOT = Path(os.environ.get("MASKTRAIN_GOLDEN_DIR", REPO.parent / "shared" / "golden")) / "mae_ast"
CASES = sorted(p.stem for p in ROOT.glob("*.json"))
TENSOR, LOSS, GRAD = 1e-5, 1e-5, 2e-4


class Case:
    """One golden case and what our model makes of it."""

    def __init__(self, name: str) -> None:
        self.record: dict[str, Any] = json.loads((ROOT / f"{name}.json").read_text())
        self.arrays = {k: torch.from_numpy(v) for k, v in np.load(ROOT / f"{name}.npz").items()}
        self.state = {k: torch.from_numpy(v) for k, v in np.load(ROOT / f"{name}.state.npz").items()}
        made = self.record["constructor"]
        self.clips, frames, mels = self.arrays["input"].shape
        patch_time = made.get("ast_kernel_size_time", 16)
        patch_freq = made.get("ast_kernel_size_chan", 16)
        assert made.get("ast_kernel_stride_time", patch_time) == patch_time
        assert made.get("ast_kernel_stride_chan", patch_freq) == patch_freq
        self.grid = TokenGrid(
            freq=mels // patch_freq,
            patch_freq=patch_freq,
            patch_time=patch_time,
            order="time",
            partial="drop",
        )
        self.config = MaeAstConfig(
            encoder_layers=made.get("encoder_layers", 12),
            embed_dim=made.get("encoder_embed_dim", 768),
            ffn_dim=made.get("encoder_ffn_embed_dim", 3072),
            heads=made.get("encoder_attention_heads", 12),
            decoder_layers=made.get("decoder_layers", 2),
            decoder_embed_dim=made.get("decoder_embed_dim", 768),
            decoder_ffn_dim=made.get("encoder_ffn_embed_dim", 3072),
            decoder_heads=made.get("encoder_attention_heads", 12),
            bridge=made.get("use_post_enc_proj", False),
            norm="pre" if made.get("layer_norm_first") else "post",
            dropout=made["dropout"],
            attention_dropout=made["attention_dropout"],
            activation_dropout=made["activation_dropout"],
            dropout_input=made["dropout_input"],
            encoder_layerdrop=made["encoder_layerdrop"],
            decoder_layerdrop=made["decoder_layerdrop"],
        )
        lengths = (frames,) * self.clips
        self.spectrogram = Spectrogram(
            self.arrays["input"].flatten(0, 1),
            lengths,
            cumulative(lengths, torch.int64, "cpu"),
            torch.arange(self.clips),
        )
        self.plan: MaskPlan = plan_from_ids(
            self.grid.layout(self.spectrogram), self.arrays["retained_ids"].tolist()
        )
        self.model = self.new_model()
        self.model.load_state_dict(import_state(self.state, self.model.state_dict()))
        norm = self.model.input_norm
        # The stored running values are those after the one training step, from (0, 1).
        self.stored = norm.running_mean.clone(), norm.running_var.clone()
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        statistics = norm.statistics(self.spectrogram.frames)
        self.mean, self.scale = norm.affine(statistics)
        norm.update(statistics)
        self.model.train()
        self.output: MaeAstOutput = self.model(self.spectrogram, self.plan, self.mean, self.scale, None)
        self.terms: dict[str, LossTerm] = joint.terms(
            self.output, self.spectrogram, self.plan, self.mean, self.scale, joint.JointConfig()
        )
        self.loss = joint.total(self.terms, joint.counts(self.plan, self.grid))
        self.loss.backward()

    def new_model(self) -> MaeAst:
        return MaeAst(self.config, self.grid, InputNormConfig(kind="batch", factor=0.5))

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the reference's names."""
        return export_state({n: p.grad for n, p in self.model.named_parameters() if p.grad is not None})


@cache
def run(name: str) -> Case:
    torch.manual_seed(0)
    return Case(name)


@pytest.fixture(params=CASES or [None])
def case(request: pytest.FixtureRequest) -> Case:
    if request.param is None:
        pytest.skip(f"no golden data at {ROOT}; set MASKTRAIN_GOLDEN_DIR")
    return run(request.param)


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got.detach() - want).abs().max()) <= TENSOR


def test_patches(case: Case) -> None:
    grid, layout = case.grid, case.plan.layout
    patches = mask_gather(
        case.spectrogram.frames,
        layout.cu_frames,
        layout.cu_tokens,
        torch.arange(sum(layout.lengths), dtype=torch.int32),
        mean=case.mean,
        scale=case.scale,
        freq=grid.freq,
        patch_freq=grid.patch_freq,
        patch_time=grid.patch_time,
        order=grid.order,
    )
    close(patches, case.arrays["patches"].flatten(0, 1))


def test_running_statistics(case: Case) -> None:
    norm = case.model.input_norm
    close(norm.running_mean, case.stored[0])
    close(norm.running_var, case.stored[1])


def test_positions(case: Case) -> None:
    for name in ("enc_sine_pos_embed.pe", "dec_sine_pos_embed.pe"):
        table = case.state[name][0]
        assert float((sincos_table(*table.shape) - table).abs().max()) <= 1e-6


def test_masked_ids(case: Case) -> None:
    masked = case.plan.masked.view(case.clips, -1) - case.plan.layout.cu_tokens[:-1, None]
    assert torch.equal(masked.long(), case.arrays["masked_ids"].sort().values)


def test_encoder(case: Case) -> None:
    """Ours is in ascending order, theirs in the order in which the tokens were drawn."""
    order = case.arrays["retained_ids"].argsort()
    want = torch.take_along_dim(case.arrays["encoder_out"], order[:, :, None], 1)
    close(case.output.encoder_out.view(want.shape), want)


@pytest.mark.parametrize("name", ["decoder_out", "pred_recon", "pred_class"])
def test_decoder(case: Case, name: str) -> None:
    close(getattr(case.output, name), case.arrays[name].flatten(0, 1))


def test_losses(case: Case) -> None:
    want = case.record["loss"]
    assert abs(float(case.loss.detach()) - want) <= LOSS + 1e-6 * abs(want)
    for ours, theirs in (("mse", "loss_recon"), ("info_nce", "loss_info_nce")):
        got, want = case.terms[ours], float(case.arrays[theirs])
        assert abs(float(got.sum.detach()) / got.count - want) <= LOSS + 1e-6 * abs(want)


def test_gradient_norms(case: Case) -> None:
    got = {name: float(grad.norm()) for name, grad in case.gradients().items()}
    want = {n: v for n, v in case.record["grad_norms"].items() if n not in IGNORED}
    assert got.keys() == want.keys()
    wrong = {n: (g, want[n]) for n, g in got.items() if abs(g - want[n]) > GRAD * want[n] + 1e-6}
    assert not wrong


def test_gradient_sums(case: Case) -> None:
    """A sum is small against its norm: compared on the scale of norm * sqrt(size), which bounds it."""
    for name, grad in case.gradients().items():
        scale = case.record["grad_norms"][name] * math.sqrt(grad.numel())
        assert abs(float(grad.sum()) - case.record["grad_sums"][name]) <= GRAD * scale + 1e-6, name


def test_weights_round_trip(case: Case) -> None:
    """Every name of the reference is ours or on the list; export gives back the same bits."""
    imported = import_state(case.state, case.model.state_dict())
    assert imported.keys() == case.model.state_dict().keys()
    exported = export_state(imported)
    assert exported.keys() == case.state.keys() - set(IGNORED)
    assert all(torch.equal(value, case.state[name]) for name, value in exported.items())


def test_config_from_weights(case: Case) -> None:
    got = config_from_state(case.state, heads=case.config.heads)
    for name in (
        "encoder_layers",
        "embed_dim",
        "ffn_dim",
        "decoder_layers",
        "decoder_embed_dim",
        "decoder_ffn_dim",
    ):
        assert getattr(got, name) == getattr(case.config, name)


def test_initial_weights(case: Case) -> None:
    """Constants are exact; means, deviations and ranges of random parameters agree within sampling error."""
    torch.manual_seed(1)
    fresh = {n: p for n, p in export_state(case.new_model().state_dict()).items() if "running" not in n}
    wanted = case.record["init_stats_before_perturbation"]
    assert fresh.keys() == wanted.keys() - set(IGNORED)
    for name, ours in fresh.items():
        theirs = wanted[name]
        assert list(ours.shape) == theirs["shape"], name
        if theirs["std"] == 0:
            assert float(ours.min()) == float(ours.max()) == theirs["mean"], name
            continue
        n, std = ours.numel(), theirs["std"]
        # Both sides are samples: 5 standard errors of their difference.
        assert abs(float(ours.mean()) - theirs["mean"]) <= 5 * std * math.sqrt(2 / n), name
        assert abs(float(ours.std()) / std - 1) <= 5 * math.sqrt(2 / (2 * n)), name
        reach = max(abs(theirs["min"]), abs(theirs["max"]))
        assert 0.6 < float(ours.abs().max()) / reach < 1.6, name
        assert (float(ours.min()) < 0) == (theirs["min"] < 0), name
