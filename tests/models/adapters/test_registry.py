# SPDX-License-Identifier: Apache-2.0
"""The projects: told by their names, tables recognised, sizes read, and timm's names against a written list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import published
import pytest
import torch
from torch import Tensor

from masktrain.errors import CheckpointError
from masktrain.models.adapters.registry import PROJECTS, looks_like, project_of
from masktrain.models.adapters.tables import grid_table
from masktrain.models.mae import MaeConfig
from masktrain.recipes import RECIPES
from masktrain.types import TokenGrid

FREQ = TokenGrid(freq=8, patch_freq=16, patch_time=16, order="freq", partial="drop")
TIME = replace(FREQ, order="time")
LOOKS: dict[str, tuple[Callable[..., dict[str, Tensor]], set[str]]] = {
    # the names of MaskSpec are those of AudioMAE with a global decoder, and of M2D's MAE without statistics
    "maskspec": (
        published.maskspec,
        {"maskspec", "maskspec_small", "maskspec_tiny", "msm_mae", "audiomae"},
    ),
    "msm_mae": (published.msm_mae, {"msm_mae"}),
    "msm_mae_orig": (published.msm_mae_orig, {"msm_mae_orig"}),
    "audiomae": (published.audiomae, {"audiomae"}),
    "ssast": (published.ssast, {"ssast_patch", "ssast_frame"}),
    "mae_ast": (
        lambda w, d: published.mae_ast(w, d, 16),
        {"mae_ast_patch", "mae_ast_frame", "mae_ast_patch_6l", "mae_ast_frame_6l"},
    ),
}


@pytest.mark.parametrize("name", LOOKS)
def test_what_a_file_looks_like(name: str) -> None:
    make, expected = LOOKS[name]
    state = {key.removeprefix("module."): tensor for key, tensor in make(8, 1).items()}
    assert set(looks_like(state)) == expected
    assert looks_like({**state, "target_blocks.0.norm1.weight": torch.ones(8)}) == ("m2d",)


def test_every_project_has_names_of_its_own() -> None:
    recipes = [recipe for project in PROJECTS for recipe in project.recipes]
    assert len(recipes) == len(set(recipes))
    assert set(recipes) <= set(RECIPES)
    assert project_of("mae_ast_patch") is not None and project_of("none") is None


@pytest.mark.parametrize("leading", [0, 1])
def test_tables_agree_with_the_formula(leading: int) -> None:
    """Against tables computed from the formula in float64, for grids that are no squares."""
    own = grid_table("sincos_2d", 16, FREQ, 5, leading)
    assert (own - published.grid_table(16, 8, 5, leading)).abs().max() < 1e-6
    own = grid_table("sincos_2d", 16, TIME, 5, leading)
    assert (own - published.grid_table(16, 5, 8, leading)).abs().max() < 1e-6
    # AudioMAE: tokens time-major, the table that of the transposed grid
    own = grid_table("sincos_2d_transposed", 16, TIME, 5, leading)
    assert (own - published.grid_table(16, 8, 5, leading)).abs().max() < 1e-6
    own = grid_table("sincos_1d", 16, FREQ, 5, leading)
    assert (own - published.interleaved(40, 16, torch.float64, leading)).abs().max() < 1e-6


def positions(state: dict[str, Tensor], grid: TokenGrid, config: MaeConfig) -> tuple[MaeConfig, int | None]:
    project = project_of("maskspec")
    assert project is not None
    return project.positions(state, config, grid)


CONFIG = MaeConfig(embed_dim=16, heads=2, ffn_dim=16, decoder_embed_dim=8, decoder_heads=2, decoder_ffn_dim=8)


def test_the_table_says_which_positions() -> None:
    straight, swapped = published.grid_table(16, 5, 8), published.grid_table(16, 8, 5)
    small = published.grid_table(8, 8, 5)
    got, columns = positions({"pos_embed": straight}, TIME, CONFIG)
    assert (got.positions, columns) == ("sincos_2d", 5)
    got, columns = positions({"pos_embed": swapped, "decoder_pos_embed": small}, TIME, CONFIG)
    assert (got.positions, got.decoder_positions, columns) == ("sincos_2d_transposed",) * 2 + (5,)
    got, _ = positions({"decoder_pos_embed": published.interleaved(40, 8, torch.float64, 1)}, TIME, CONFIG)
    assert (got.positions, got.decoder_positions) == ("sincos_2d", "sincos_1d")
    assert positions({}, TIME, CONFIG) == (CONFIG, None)
    got, _ = positions({"pos_embed": swapped.half()}, TIME, CONFIG)
    assert got.positions == "sincos_2d_transposed"


def test_a_square_grid_leaves_the_recipe_s_positions() -> None:
    """Where both axes are alike the two tables are one."""
    config = replace(CONFIG, positions="sincos_2d_transposed")
    got, _ = positions({"pos_embed": published.grid_table(16, 8, 8)}, TIME, config)
    assert got.positions == "sincos_2d_transposed"


def test_tables_that_are_none() -> None:
    table = published.grid_table(16, 5, 8)
    moved = table.clone()
    moved[0, 3, 2] += 1e-3
    wrong = {
        "moved": moved,
        "class token": torch.cat([table[:, :1] + 1e-3, table[:, 1:]], dim=1),
        "other kind": published.interleaved(40, 16, torch.float64, 1),
        "nan": table * float("nan"),
        "no column": table[:, :-1],
        "no class token": table[:, 1:],
        "width": table[..., :8],
        "rank": table[0],
        "empty": table[:, :1],
        "batch": table.expand(2, -1, -1),
    }
    for kind, tensor in wrong.items():
        with pytest.raises(CheckpointError, match="pos_embed"):
            positions({"pos_embed": tensor}, TIME, CONFIG)
            pytest.fail(kind)
    with pytest.raises(CheckpointError, match="time columns"):
        positions({"pos_embed": table, "decoder_pos_embed": published.grid_table(8, 6, 8)}, TIME, CONFIG)


VIT = """norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias norm2.weight norm2.bias
mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias""".split()


def timm_shapes(width: int, depth: int, tokens: int, leading: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of timm 1.0's VisionTransformer with num_classes=0, and of its distilled one."""
    out: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, leading + tokens, width),
        "patch_embed.proj.weight": (width, 1, 16, 16),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if leading == 2:
        out["dist_token"] = (1, 1, width)
    shapes = {"attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,)}
    shapes |= {"attn.proj.weight": (width, width), "mlp.fc1.weight": (4 * width, width)}
    shapes |= {"mlp.fc1.bias": (4 * width,), "mlp.fc2.weight": (width, 4 * width)}
    return out | {f"blocks.{i}.{n}": shapes.get(n, (width,)) for i in range(depth) for n in VIT}


@pytest.mark.parametrize(
    ("recipe", "tokens", "leading"),
    [
        ("maskspec", 496, 1),
        ("msm_mae", 190, 1),
        ("msm_mae_orig", 65, 1),
        ("audiomae", 512, 1),
        ("ssast_patch", 512, 2),
    ],
)
def test_timm_s_names(recipe: str, tokens: int, leading: int) -> None:
    project = project_of(recipe)
    assert project is not None and project.timm is not None
    make = LOOKS["ssast" if recipe == "ssast_patch" else recipe][0]
    state = {key.removeprefix("module."): tensor for key, tensor in make(8, 2).items()}
    got = project.timm(state)
    assert {name: tuple(t.shape) for name, t in got.items()} == timm_shapes(8, 2, tokens, leading)
    if recipe == "msm_mae_orig":
        q, k, v = got["blocks.1.attn.qkv.bias"].chunk(3)
        assert torch.equal(q, state["blocks.1.attn.q_bias"]) and torch.equal(v, state["blocks.1.attn.v_bias"])
        assert not k.any()
