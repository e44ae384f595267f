# SPDX-License-Identifier: Apache-2.0
"""The recipes by name. A recipe is a function `(size) -> Recipe`; adding one is adding a line here."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

from masktrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from masktrain.training.recipe import Recipe

SIZES = ("tiny", "small", "base")

# name -> (module, one line); the module is imported when the recipe is asked for, so that listing them is quick
RECIPES = {
    "audiomae": ("audiomae", "AudioMAE, 16x16 patches, random masks, decoder in shifted windows"),
    "mae_ast_frame": ("mae_ast", "MAE-AST, tokens of 2 frames, random masks, 12 layers"),
    "mae_ast_frame_6l": ("mae_ast", "MAE-AST, tokens of 2 frames, random masks, 6 layers"),
    "mae_ast_patch": ("mae_ast", "MAE-AST, 16x16 patches, chunk masks, 12 layers"),
    "mae_ast_patch_6l": ("mae_ast", "MAE-AST, 16x16 patches, chunk masks, 6 layers"),
    "maskspec": ("maskspec", "MaskSpec, 32 kHz, 16x16 patches, random masks, encoder 12 x 768"),
    "maskspec_small": ("maskspec", "MaskSpec, encoder 12 x 384"),
    "maskspec_tiny": ("maskspec", "MaskSpec, encoder 12 x 192"),
    "msm_mae": ("msm_mae", "MSM-MAE, 80 mel bins, 6.08 s, targets normalised per patch"),
    "msm_mae_orig": ("msm_mae", "MSM-MAE as first published: 2.08 s, plain targets"),
    "ssast_frame": ("ssast", "SSAST, tokens of 2 frames, random masks, matching and reconstruction"),
    "ssast_patch": ("ssast", "SSAST, 16x16 patches, chunk masks, matching and reconstruction"),
}

VARIANTS = ("_6l", "_small", "_tiny", "_orig")
"""Endings of recipes that differ from the one without in sizes and readings, but not in what a step does."""


def distinct() -> tuple[str, ...]:
    """Return the names of the recipes that are no variant of another one."""
    return tuple(name for name in RECIPES if not name.endswith(VARIANTS))


def find(name: str, size: str = "base") -> Recipe:
    """Return the recipe `name` in a named size. Raises ConfigError for an unknown name or size."""
    if name not in RECIPES:
        raise ConfigError(
            f"--recipe: no recipe {name!r}.{nearest(name, RECIPES)} `masktrain recipes list` shows all: "
            f"{', '.join(RECIPES)}."
        )
    if size not in SIZES:
        raise ConfigError(f"--size: no size {size!r}.{nearest(size, SIZES)} Allowed: {', '.join(SIZES)}.")
    function: Callable[[str], Recipe] = getattr(import_module(f"masktrain.recipes.{RECIPES[name][0]}"), name)
    return function(size)
