# SPDX-License-Identifier: Apache-2.0
"""The reference projects whose checkpoints are read and written.

A further project is one more `Project`: a module beside this one that renames its weights, a function in sizes.py
that tells the sizes from them, and what of a checkpoint is not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from masktrain.errors import CheckpointError
from masktrain.models.adapters import mae, mae_ast, sizes, ssast, tables
from masktrain.models.mae import MaeConfig
from masktrain.models.mae_ast import MaeAstConfig
from masktrain.models.positions import sincos_table
from masktrain.models.ssast import LEADING, SsastConfig
from masktrain.types import TokenGrid

State = Mapping[str, Tensor]
MAE_AST_TOKENS = 48_000
"""Rows of the published position tables (AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py, max_token_length)."""


@dataclass(frozen=True)
class Project:
    """One reference project, or one of the models in it.

    recipes: those whose weights these are. config: of the model. marks: names that every checkpoint of it has; never:
    names that none has. sizes: state -> the fields of the config that the weights tell. positions: (state,
    config, grid) -> config with the positions that the file's tables have, and their time columns, None where it has
    none; raises CheckpointError. fixed: (config, grid, columns) -> what the reference has beside the learned weights,
    by its names, as it has it in a new model. rename: (reference's state, ours, grid) -> the weights under our names.
    export: (our state, grid) -> the weights under the reference's names. ignored: its names without a counterpart.
    timm: the encoder under the names of timm's ViT, from the reference's state; None: no_timm says why not.
    norm_name: the tensor [mean, std] of the log-mel. key, prefix: of the dict that its .pth files hold, and of all
    names in it.
    """

    name: str
    recipes: tuple[str, ...]
    config: type
    marks: tuple[str, ...]
    never: tuple[str, ...]
    sizes: Callable[[State], dict[str, Any]]
    positions: Callable[[State, Any, TokenGrid], tuple[Any, int | None]]
    fixed: Callable[[Any, TokenGrid, int], dict[str, Tensor]]
    rename: Callable[[State, State, TokenGrid], dict[str, Tensor]]
    export: Callable[[State, TokenGrid], dict[str, Tensor]]
    ignored: tuple[str, ...]
    timm: Callable[[State], dict[str, Tensor]] | None
    no_timm: str = ""
    norm_name: str | None = None
    key: str | None = "model"
    prefix: str = ""
    patch_name: str = "patch_embed.proj.weight"

    def fits(self, state: State) -> bool:
        """Whether names and dimensions of a state dict can be this project's."""
        return all(name in state for name in self.marks) and not any(name in state for name in self.never)


def project_of(recipe: str) -> Project | None:
    """Return the project whose weights a recipe of this name trains."""
    return next((project for project in PROJECTS if recipe in project.recipes), None)


def looks_like(state: State) -> tuple[str, ...]:
    """Return the recipes whose published weights a state dict could be; M2D's are told by name although they are not
    read."""
    if any(name.startswith("target_blocks.") for name in state):
        return ("m2d",)
    return tuple(recipe for project in PROJECTS if project.fits(state) for recipe in project.recipes)


def _check_bins(what: str, bins: float, grid: TokenGrid) -> None:
    own = grid.freq * grid.patch_freq
    if bins != own:
        raise CheckpointError(
            f"weights: {what} {bins} mel bins, and the front end has {own}. Set --frontend.mel.n-mels {bins}."
        )


# --- the descendants of facebookresearch/mae ---

_GRID_KINDS = ("sincos_2d", "sincos_2d_transposed")
# the table in the file, the fields with its kind and width, the kinds that there are
_MAE_TABLES = (
    ("pos_embed", "positions", "embed_dim", _GRID_KINDS),
    ("decoder_pos_embed", "decoder_positions", "decoder_embed_dim", (*_GRID_KINDS, "sincos_1d")),
)


def _mae_positions(state: State, config: MaeConfig, grid: TokenGrid) -> tuple[MaeConfig, int | None]:
    leading = int(config.cls_token)
    found: dict[str, int] = {}
    for name, field_name, width, kinds in _MAE_TABLES:
        if name not in state:
            continue
        table = state[name]
        columns = tables.table_columns(name, table, getattr(config, width), grid, leading)
        found[name] = columns
        # the recipe's own first: where both axes are alike, several kinds are one table
        own = getattr(config, field_name)
        order = (own, *(kind for kind in kinds if kind != own))
        chosen: dict[str, Any] = {field_name: tables.table_kind(name, table, order, grid, columns, leading)}
        config = replace(config, **chosen)
    if len(set(found.values())) > 1:
        raise CheckpointError(
            f"weights: the position tables have {' and '.join(map(str, found.values()))} time columns; expected the same."
        )
    return config, next(iter(found.values()), None)


def _mae_fixed(config: MaeConfig, grid: TokenGrid, columns: int) -> dict[str, Tensor]:
    return {
        name: tables.grid_table(
            getattr(config, field_name), getattr(config, width), grid, columns, int(config.cls_token)
        )
        for name, field_name, width, _ in _MAE_TABLES
    }


def _mae_timm(state: State) -> dict[str, Tensor]:
    """Return the encoder. Where the reference has no bias of the keys, timm's bias of q, k and v has zeros."""
    kept = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    out = {name: tensor for name, tensor in state.items() if name.startswith(kept)}
    for name in [name for name in out if name.endswith(".q_bias")]:
        base = name.removesuffix("q_bias")
        q, v = out.pop(name), out.pop(f"{base}v_bias")
        out[f"{base}qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return out


def _mae(
    name: str, recipes: tuple[str, ...], marks: tuple[str, ...], never: tuple[str, ...], norm: str | None
) -> Project:
    return Project(
        name=name,
        recipes=recipes,
        config=MaeConfig,
        marks=("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", *marks),
        never=(_TARGET, *never),
        sizes=sizes.mae_sizes,
        positions=_mae_positions,
        fixed=_mae_fixed,
        rename=mae.import_state,
        export=mae.export_state,
        ignored=mae.IGNORED,
        timm=_mae_timm,
        norm_name=norm,
    )


_TAU = "decoder_blocks.0.attn.tau"
_Q_BIAS = "blocks.0.attn.q_bias"
_TARGET = "target_blocks.0.norm1.weight"
"""Of M2D, whose other names are those of an MAE."""

# --- MAE-AST ---


def _mae_ast_positions(
    state: State, config: MaeAstConfig, grid: TokenGrid
) -> tuple[MaeAstConfig, int | None]:
    if "layer_norm.weight" in state:
        _check_bins("layer_norm.weight has", state["layer_norm.weight"].numel(), grid)
    for name, width in (
        ("enc_sine_pos_embed.pe", config.embed_dim),
        ("dec_sine_pos_embed.pe", config.decoder_embed_dim),
    ):
        if name in state:
            tables.check_flat_table(name, state[name], width)
    return config, None


def _mae_ast_fixed(config: MaeAstConfig, grid: TokenGrid, columns: int) -> dict[str, Tensor]:
    """Return tables and batch counter, and the weights that the reference's forward pass never uses."""
    bins = grid.freq * grid.patch_freq
    return {
        "layer_norm.weight": torch.ones(bins),
        "layer_norm.bias": torch.zeros(bins),
        "encoder_mask_emb": torch.zeros(config.embed_dim),
        "enc_sine_pos_embed.pe": sincos_table(MAE_AST_TOKENS, config.embed_dim)[None],
        "dec_sine_pos_embed.pe": sincos_table(MAE_AST_TOKENS, config.decoder_embed_dim)[None],
        "batch_norm.num_batches_tracked": torch.zeros((), dtype=torch.int64),
    }


# --- SSAST ---

_SSAST_CLASSES = 1000
"""Classes of the heads of the DeiT backbone, which pretraining never uses."""


def _ssast_positions(state: State, config: SsastConfig, grid: TokenGrid) -> tuple[SsastConfig, int | None]:
    for name in ("p_input_fdim", "p_input_tdim"):
        if name in state and state[name].numel() != 1:
            raise CheckpointError(
                f"weights: {name} has shape {tuple(state[name].shape)}; expected one number."
            )
    if "p_input_fdim" in state:
        _check_bins("p_input_fdim says", state["p_input_fdim"].item(), grid)
    if "v.pos_embed" not in state:
        return config, None
    columns = tables.table_columns("v.pos_embed", state["v.pos_embed"], config.embed_dim, grid, LEADING)
    frames = state["p_input_tdim"].item() if "p_input_tdim" in state else columns * grid.patch_time
    if not columns * grid.patch_time <= frames < (columns + 1) * grid.patch_time:
        raise CheckpointError(
            f"weights: p_input_tdim says {frames} frames, and v.pos_embed has {columns} columns of {grid.patch_time}."
        )
    return replace(config, columns=columns), columns


def _ssast_fixed(config: SsastConfig, grid: TokenGrid, columns: int) -> dict[str, Tensor]:
    """Return the size of the input, and the class heads of the backbone, without use: zeros."""
    out = {
        "p_input_fdim": torch.tensor(grid.freq * grid.patch_freq),
        "p_input_tdim": torch.tensor(columns * grid.patch_time),
    }
    for head in ("v.head", "v.head_dist"):
        out[f"{head}.weight"] = torch.zeros(_SSAST_CLASSES, config.embed_dim)
        out[f"{head}.bias"] = torch.zeros(_SSAST_CLASSES)
    return out


def _ssast_timm(state: State) -> dict[str, Tensor]:
    """Return the backbone, timm's distilled ViT."""
    return {
        name.removeprefix("v."): tensor
        for name, tensor in state.items()
        if name.startswith("v.") and not name.startswith("v.head")
    }


PROJECTS = (
    Project(
        name="AlanBaade/MAE-AST-Public",
        recipes=("mae_ast_frame", "mae_ast_patch", "mae_ast_frame_6l", "mae_ast_patch_6l"),
        config=MaeAstConfig,
        marks=("post_extract_proj.weight", "encoder.layers.0.self_attn.q_proj.weight"),
        never=(),
        sizes=sizes.mae_ast_sizes,
        positions=_mae_ast_positions,
        fixed=_mae_ast_fixed,
        rename=lambda state, wanted, grid: mae_ast.import_state(state, wanted),
        export=lambda state, grid: mae_ast.export_state(state),
        ignored=mae_ast.IGNORED,
        timm=None,
        no_timm="its blocks normalise after each half and there is no class token; timm's ViT normalises before",
        patch_name="post_extract_proj.weight",
    ),
    Project(
        name="YuanGongND/ssast",
        recipes=("ssast_patch", "ssast_frame"),
        config=SsastConfig,
        marks=("v.patch_embed.proj.weight", "v.blocks.0.attn.qkv.weight"),
        never=(),
        sizes=sizes.ssast_sizes,
        positions=_ssast_positions,
        fixed=_ssast_fixed,
        rename=ssast.import_state,
        export=ssast.export_state,
        ignored=ssast.IGNORED,
        timm=_ssast_timm,
        key=None,
        prefix=ssast.PARALLEL,
        patch_name="v.patch_embed.proj.weight",
    ),
    _mae(
        "WangHelin1997/MaskSpec",
        ("maskspec", "maskspec_small", "maskspec_tiny"),
        (),
        (_TAU, _Q_BIAS, "norm_stats"),
        None,
    ),
    _mae("nttcslab/msm-mae", ("msm_mae_orig",), (_Q_BIAS,), (_TAU,), None),
    _mae("nttcslab/m2d, its MAE", ("msm_mae",), (), (_TAU, _Q_BIAS), "norm_stats"),
    _mae("facebookresearch/AudioMAE", ("audiomae",), (), (_Q_BIAS, "norm_stats"), None),
)
"""A name in `never` tells projects with otherwise equal names apart."""
