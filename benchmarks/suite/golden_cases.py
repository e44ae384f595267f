# SPDX-License-Identifier: Apache-2.0
"""Recorded cases of the original code, and the same made by our models: what the GPU suite and the tests compare.

A case is NAME.json (constructor, loss, gradient norms), NAME.npz (inputs, masks, tensors) and NAME.state.npz (weights
under the reference's names). Options that a constructor leaves out have the default of that project's class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masktrain.masking.plan import plan_from_ids
from masktrain.models.adapters import mae as mae_names
from masktrain.models.adapters import mae_ast as mae_ast_names
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae import Mae, MaeConfig
from masktrain.models.mae_ast import MaeAst, MaeAstConfig
from masktrain.models.pretrainer import Prediction, Pretrainer
from masktrain.objectives.joint import JointConfig
from masktrain.objectives.patches import standardised
from masktrain.objectives.reconstruction import ReconstructionConfig
from masktrain.objectives.registry import Objective, total
from masktrain.types import LossTerm, MaskPlan, Spectrogram, TokenGrid, cumulative

TENSOR, LOSS, GRADIENT = 1e-5, 1e-5, 2e-4
"""Allowed differences: absolute of tensors; of losses, beside 1e-6 of the loss; relative of gradient norms, + 1e-6."""

# descendants of one class, whose constructors differ little
MAE_PEERS = ("maskspec", "msm_mae", "m2d", "audiomae")


@dataclass
class Case:
    """One case: what was recorded, and our model of the same form with the recorded weights.

    export_state: a state dict of ours (or gradients) under the reference's names; import_state: the other way, given
    our state dict for the shapes. ignored: names of the reference without a counterpart. fresh: a new model.
    """

    peer: str
    name: str
    record: dict[str, Any]
    arrays: dict[str, Tensor]
    state: dict[str, Tensor]
    grid: TokenGrid
    fresh: Callable[[], Pretrainer]
    model: Pretrainer
    spectrogram: Spectrogram
    plan: MaskPlan
    mean: Tensor
    scale: Tensor
    objective: Objective
    export_state: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    import_state: Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
    ignored: tuple[str, ...]

    def run(self) -> tuple[Prediction, dict[str, LossTerm], Tensor]:
        """Do forward and backward; return prediction, terms and loss."""
        plans = (self.plan,)
        prediction = self.model(self.spectrogram, plans, self.mean, self.scale, None)
        terms = self.objective.terms(prediction, self.spectrogram, plans, self.mean, self.scale)
        loss = total(terms, self.objective.counts(plans, self.grid))
        loss.backward()
        return prediction, terms, loss.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Gradients under the reference's names."""
        return self.export_state({n: p.grad for n, p in self.model.named_parameters() if p.grad is not None})

    def recorded_norms(self) -> dict[str, float]:
        """Recorded gradient norms of the parameters that have a counterpart."""
        return {n: v for n, v in self.record["grad_norms"].items() if n not in self.ignored}

    @torch.no_grad()
    def tensors(self, prediction: Prediction) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (ours, recorded) of every recorded tensor, by its name in the record."""
        both = _mae_ast_tensors if self.peer == "mae_ast" else _mae_tensors
        return {
            name: (ours, self.arrays[name].to(ours.device)) for name, ours in both(self, prediction).items()
        }

    def all_patches(self) -> Tensor:
        """Return (N, P), the normalised patches of all tokens."""
        layout = self.plan.layout
        everything = torch.arange(
            sum(layout.lengths), dtype=torch.int32, device=self.spectrogram.frames.device
        )
        return self.model.read_patches(self.spectrogram, layout, everything, self.mean, self.scale)


def served(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (project, case) of every recorded case that our models have a form for."""
    for peer in ("mae_ast", *MAE_PEERS):
        for path in sorted((folder / peer).glob("*.json")):
            if peer == "mae_ast" or _is_mae(peer, json.loads(path.read_text())):
                yield peer, path.stem


def _is_mae(peer: str, record: dict[str, Any]) -> bool:
    """M2D's repository also has M2D itself: another model, another objective."""
    return peer != "m2d" or record.get("class") == "MaskedAutoencoderViT"


def load(folder: Path, peer: str, name: str, device: torch.device) -> Case:
    """Return a case of `served`."""
    path = folder / peer / name
    record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    arrays = {k: torch.from_numpy(v) for k, v in np.load(f"{path}.npz").items()}
    state = {k: torch.from_numpy(v) for k, v in np.load(f"{path}.state.npz").items()}
    make = _mae_ast if peer == "mae_ast" else _mae
    return make(peer, name, record, arrays, state, device)


def _spectrogram(frames: Tensor, device: torch.device) -> Spectrogram:
    """frames: (B, T, F)."""
    clips, length, _ = frames.shape
    lengths = (length,) * clips
    return Spectrogram(
        frames.flatten(0, 1).contiguous().to(device),
        lengths,
        cumulative(lengths, torch.int64, device),
        torch.arange(clips, device=device),
    )


def _as_drawn(case: Case, ids: str, rows: Tensor, leading: int) -> Tensor:
    """Return our rows, (B (leading + V), D) ascending, as (B, leading + V, D) in the order of the recorded ids."""
    place = case.arrays[ids].to(rows.device).argsort().argsort()
    rows = rows.unflatten(0, (len(place), -1))
    return torch.cat([rows[:, :leading], torch.take_along_dim(rows[:, leading:], place[:, :, None], 1)], 1)


def _mae_ast(
    peer: str,
    name: str,
    record: dict[str, Any],
    arrays: dict[str, Tensor],
    state: dict[str, Tensor],
    device: torch.device,
) -> Case:
    made = record["constructor"]
    mels = arrays["input"].shape[2]
    patch_time, patch_freq = made.get("ast_kernel_size_time", 16), made.get("ast_kernel_size_chan", 16)
    assert made.get("ast_kernel_stride_time", patch_time) == patch_time
    assert made.get("ast_kernel_stride_chan", patch_freq) == patch_freq
    grid = TokenGrid(
        freq=mels // patch_freq, patch_freq=patch_freq, patch_time=patch_time, order="time", partial="drop"
    )
    config = MaeAstConfig(
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
    fresh = partial(MaeAst, config, grid, InputNormConfig(kind="batch", factor=0.5))
    model = fresh()
    model.load_state_dict(mae_ast_names.import_state(state, model.state_dict()))
    model.to(device).train()
    spectrogram = _spectrogram(arrays["input"], device)
    # of the batch itself, in training
    mean, scale = model.input_norm.affine(model.input_norm.statistics(spectrogram.frames))
    return Case(
        peer=peer,
        name=name,
        record=record,
        arrays=arrays,
        state=state,
        grid=grid,
        fresh=fresh,
        model=model,
        spectrogram=spectrogram,
        plan=plan_from_ids(grid.layout(spectrogram), arrays["retained_ids"].tolist()),
        mean=mean,
        scale=scale,
        objective=JointConfig(),
        export_state=mae_ast_names.export_state,
        import_state=mae_ast_names.import_state,
        ignored=mae_ast_names.IGNORED,
    )


def _mae_ast_tensors(case: Case, prediction: Prediction) -> dict[str, Tensor]:
    model, clips = case.model, len(case.plan.layout.lengths)
    assert (
        isinstance(model, MaeAst) and prediction.pred_recon is not None and prediction.pred_class is not None
    )
    encoder_out = prediction.encoder_out
    ours = {
        "patches": case.all_patches(),
        "decoder_out": model.decode(encoder_out, case.plan, None, None),
        "pred_recon": prediction.pred_recon,
        "pred_class": prediction.pred_class,
    }
    ours = {name: rows.unflatten(0, (clips, -1)) for name, rows in ours.items()}
    return {**ours, "encoder_out": _as_drawn(case, "retained_ids", encoder_out, 0)}


def _mae(
    peer: str,
    name: str,
    record: dict[str, Any],
    arrays: dict[str, Tensor],
    state: dict[str, Tensor],
    device: torch.device,
) -> Case:
    made = record["constructor"]
    # AudioMAE's input is (B, 1, time, mel), that of the others (B, 1, mel, time); patches are flattened the same way
    time_first = peer == "audiomae"
    assert arrays["input"].shape[1] == 1
    frames = arrays["input"][:, 0] if time_first else arrays["input"][:, 0].transpose(1, 2)
    size = made.get("patch_size", 16)
    outer, inner = (size, size) if isinstance(size, int) else size
    patch_time, patch_freq = (outer, inner) if time_first else (inner, outer)
    assert not made.get("use_custom_patch") and not made.get("pos_trainable"), "overlap, learned positions"
    layer_norm = made.get("norm_layer", "LayerNorm(eps=1e-5)")
    eps = float(layer_norm.removeprefix("LayerNorm(eps=").removesuffix(")"))
    grid = TokenGrid(
        freq=frames.shape[2] // patch_freq,
        patch_freq=patch_freq,
        patch_time=patch_time,
        order="time" if time_first else "freq",
        partial="drop",
    )
    width, decoder_width = made.get("embed_dim", 1024), made.get("decoder_embed_dim", 512)
    ratio = made.get("mlp_ratio", 4)
    positions = "sincos_2d_transposed" if time_first else "sincos_2d"
    flat = peer == "msm_mae" and not made.get("use_2d_dec_pos_embd", False)
    windows = made.get("decoder_mode", 0) == 1  # that decoder has 16 blocks and heads whatever is asked for
    config = MaeConfig(
        encoder_layers=made.get("depth", 24),
        embed_dim=width,
        ffn_dim=int(ratio * width),
        heads=made.get("num_heads", 16),
        decoder="window" if windows else "global",
        decoder_layers=16 if windows else made.get("decoder_depth", 8),
        decoder_embed_dim=decoder_width,
        decoder_ffn_dim=int(ratio * decoder_width),
        decoder_heads=16 if windows else made.get("decoder_num_heads", 16),
        position_dropout=0.0,
        cls_token="cls_token" in state,
        key_bias=peer != "msm_mae",
        positions=positions,
        decoder_positions="sincos_1d" if flat else positions,
    )
    # the input is normalised before it is recorded
    norm = InputNormConfig(kind="global", factor=1.0, dataset_mean=0.0, dataset_std=1.0)
    fresh = partial(_with_eps, eps, config, grid, norm)
    model = fresh()
    model.load_state_dict(mae_names.import_state(state, model.state_dict(), grid))
    model.to(device).train()
    spectrogram = _spectrogram(frames, device)
    mean, scale = model.input_norm.affine(None)
    return Case(
        peer=peer,
        name=name,
        record=record,
        arrays=arrays,
        state=state,
        grid=grid,
        fresh=fresh,
        model=model,
        spectrogram=spectrogram,
        plan=plan_from_ids(grid.layout(spectrogram), arrays["ids_keep"].tolist()),
        mean=mean,
        scale=scale,
        objective=ReconstructionConfig(norm_pix_loss=made.get("norm_pix_loss", False)),
        export_state=lambda values: mae_names.export_state(values, grid),
        import_state=lambda values, wanted: mae_names.import_state(values, wanted, grid),
        ignored=mae_names.IGNORED,
    )


def _with_eps(eps: float, config: MaeConfig, grid: TokenGrid, norm: InputNormConfig) -> Mae:
    """The classes take any norm layer, ours has the one of every published model: eps 1e-6."""
    model = Mae(config, grid, norm)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps
    return model


def _mae_tensors(case: Case, prediction: Prediction) -> dict[str, Tensor]:
    model, clips, plan = case.model, len(case.plan.layout.lengths), case.plan
    assert isinstance(model, Mae) and isinstance(case.objective, ReconstructionConfig)
    assert prediction.pred_recon is not None
    extra = 0 if model.cls_token is None else 1
    patches = case.all_patches()
    leading = 0 if model.config.decoder == "window" else extra  # of the decoder's rows
    everything = model.decode(prediction.encoder_out, plan, None, None).unflatten(0, (clips, -1))
    # masked tokens as the training step has them, the others through the full decoder
    pred = model.reconstruction_head(everything[:, leading:]).flatten(0, 1)
    pred = pred.index_copy(0, plan.masked.long(), prediction.pred_recon)
    ours = {"patch_tokens": model.patch_embed(patches), "pred": pred}
    if "target" in case.arrays:
        ours["target"] = standardised(patches) if case.objective.norm_pix_loss else patches
    ours = {name: rows.unflatten(0, (clips, -1)) for name, rows in ours.items()}
    ours["encoder_out"] = _as_drawn(case, "ids_keep", prediction.encoder_out, extra)
    return {**ours, "decoder_normed": everything}


def largest_error(ours: Tensor, recorded: Tensor) -> float:
    """Return the largest absolute difference; infinity for another shape or NaN."""
    if ours.shape != recorded.shape:
        return math.inf
    error = float((ours.detach() - recorded).abs().max()) if ours.numel() else 0.0
    return math.inf if math.isnan(error) else error


def wrong_loss(ours: float, recorded: float) -> bool:
    """Whether a loss is out of tolerance."""
    return not abs(ours - recorded) <= LOSS + 1e-6 * abs(recorded)


def wrong_norms(ours: dict[str, Tensor], recorded: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Return {name: (ours, recorded)} of the gradient norms that are out of tolerance; NaN where there is none."""
    norms = {name: float(grad.norm()) for name, grad in ours.items()}
    return {
        name: (norms.get(name, math.nan), recorded.get(name, math.nan))
        for name in norms.keys() | recorded.keys()
        if not abs(norms.get(name, math.nan) - recorded.get(name, math.nan))
        <= GRADIENT * recorded.get(name, math.nan) + 1e-6
    }
