# SPDX-License-Identifier: Apache-2.0
"""Does the model compute what the original code of MAE-AST computed, on this device too?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masktrain.kernels._float32 import full_float32
from masktrain.masking.plan import plan_from_ids
from masktrain.models.adapters import IGNORED, export_state, import_state
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae_ast import MaeAst, MaeAstConfig
from masktrain.objectives import joint
from masktrain.types import Spectrogram, TokenGrid, cumulative
from suite.harness import CannotRun, Check, Row

TENSOR, LOSS, GRADIENT = 1e-5, 1e-5, 2e-4


def checks(device: torch.device, folder: Path) -> Iterator[Check]:
    """Yield a check for each stored case of MAE-AST."""
    question = (
        "Do the tensors, losses and gradient norms of case {} of the original MAE-AST code agree, in float32?"
    )
    names = sorted(p.stem for p in (folder / "mae_ast").glob("*.json"))
    for name in names:
        yield Check(
            f"golden mae_ast {name}", question.format(name), partial(_agree, device, folder / "mae_ast", name)
        )
    if not names:
        yield Check("golden mae_ast", question.format("-"), partial(_absent, folder))


def _absent(folder: Path) -> Row:
    raise CannotRun(f"no golden data at {folder}; MASKTRAIN_GOLDEN_DIR names its folder")


def _agree(device: torch.device, folder: Path, name: str) -> Row:
    record: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    arrays = {k: torch.from_numpy(v).to(device) for k, v in np.load(folder / f"{name}.npz").items()}
    state = {k: torch.from_numpy(v) for k, v in np.load(folder / f"{name}.state.npz").items()}
    made = record["constructor"]
    model = _model(made, arrays["input"].shape[2])
    model.load_state_dict(import_state(state, model.state_dict()))
    model.to(device).train()
    clips, frames, _ = arrays["input"].shape
    lengths = (frames,) * clips
    spectrogram = Spectrogram(
        arrays["input"].flatten(0, 1), lengths, cumulative(lengths, torch.int64, device),
        torch.arange(clips, device=device),
    )  # fmt: skip
    plan = plan_from_ids(model.grid.layout(spectrogram), arrays["retained_ids"].tolist())
    mean, scale = model.input_norm.affine(model.input_norm.statistics(spectrogram.frames))
    with full_float32(device.type):
        output = model(spectrogram, plan, mean, scale, None)
        terms = joint.terms(output, spectrogram, plan, mean, scale, joint.JointConfig())
        loss = joint.total(terms, joint.counts(plan, model.grid))
        loss.backward()
    errors = {
        n: float((getattr(output, n).detach() - arrays[n].flatten(0, 1)).abs().max())
        for n in ("decoder_out", "pred_recon", "pred_class")
    }
    wrong = [f"{n}: {e:.3g} > {TENSOR}" for n, e in errors.items() if not e <= TENSOR]
    errors["loss"] = abs(float(loss.detach()) - record["loss"])
    if not errors["loss"] <= LOSS + 1e-6 * abs(record["loss"]):
        wrong.append(f"loss: {errors['loss']:.3g}")
    gradients = export_state({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    wanted = {n: v for n, v in record["grad_norms"].items() if n not in IGNORED}
    assert gradients.keys() == wanted.keys(), "other parameters have gradients"
    for n, value in wanted.items():
        error = abs(float(gradients[n].norm()) - value)
        errors["gradient"] = max(errors.get("gradient", 0.0), error / (value + 1e-6))
        if not error <= GRADIENT * value + 1e-6:
            wrong.append(f"gradient of {n}: {error:.3g} of {value:.3g}")
    assert not wrong, "; ".join(wrong)
    return {"errors": errors}


def _model(made: dict[str, Any], mels: int) -> MaeAst:
    patch_time, patch_freq = made.get("ast_kernel_size_time", 16), made.get("ast_kernel_size_chan", 16)
    heads, ffn = made.get("encoder_attention_heads", 12), made.get("encoder_ffn_embed_dim", 3072)
    rates = ("dropout", "attention_dropout", "activation_dropout", "dropout_input")
    config = MaeAstConfig(
        encoder_layers=made.get("encoder_layers", 12), embed_dim=made.get("encoder_embed_dim", 768), ffn_dim=ffn,
        heads=heads, decoder_layers=made.get("decoder_layers", 2), decoder_heads=heads, decoder_ffn_dim=ffn,
        decoder_embed_dim=made.get("decoder_embed_dim", 768), bridge=made.get("use_post_enc_proj", False),
        norm="pre" if made.get("layer_norm_first") else "post", encoder_layerdrop=made["encoder_layerdrop"],
        decoder_layerdrop=made["decoder_layerdrop"], **{rate: made[rate] for rate in rates},
    )  # fmt: skip
    grid = TokenGrid(
        freq=mels // patch_freq, patch_freq=patch_freq, patch_time=patch_time, order="time", partial="drop"
    )
    return MaeAst(config, grid, InputNormConfig(kind="batch", factor=0.5))
