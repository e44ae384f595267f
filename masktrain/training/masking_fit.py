# SPDX-License-Identifier: Apache-2.0
"""Which masking strategies fit a recipe, and how one is put in the place of the recipe's own."""

from __future__ import annotations

import dataclasses
from typing import Any

from masktrain.errors import ConfigError
from masktrain.masking.axes import FrequencyMasking
from masktrain.masking.inverse_block import InverseBlockMasking
from masktrain.masking.registry import Strategy
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.training import score_cache
from masktrain.training.recipe import Recipe

NEED_ROWS = {
    FrequencyMasking: "masks whole rows of the token grid",
    InverseBlockMasking: "leaves square blocks of the token grid visible",
}


def put(recipe: Recipe, cls: type[Strategy]) -> Recipe:
    """Return the recipe under another strategy: with the recipe's share of masked tokens, where the strategy has one as
    a field, and one mask for the whole batch only where all clips of a batch have one length."""
    own = {field.name for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    if "mask_ratio" in own:
        values["mask_ratio"] = recipe.masking.mask_ratio
    if "shared_in_batch" in own and not _one_length(recipe):
        values["shared_in_batch"] = False
    return dataclasses.replace(recipe, masking=cls(**values))


def _one_length(recipe: Recipe) -> bool:
    data = recipe.data
    # silence fills short clips, and does not cut long ones; the crop has done that
    return data.padding != "none" or data.crop_to_batch_min


def check(recipe: Recipe, ranks: int) -> None:
    """Raise ConfigError where the recipe's strategy makes no sense on its tokens, its model or `ranks` ranks."""
    masking, tokens = recipe.masking, recipe.tokens
    for cls, does in NEED_ROWS.items():
        if isinstance(masking, cls) and recipe.grid.freq == 1:
            raise ConfigError(
                f"masking: {masking.name} {does}, and the tokens of {recipe.name} are {tokens.patch_time} frames of all "
                f"{tokens.patch_freq} mel bins, one row. Take frame, random or chunk, or smaller patches "
                "(--tokens.patch-freq)."
            )
    if isinstance(masking, SelfGuidedMasking):
        layers = recipe.model.encoder_layers
        if masking.layer is not None and masking.layer > layers:
            raise ConfigError(
                f"masking.layer: {masking.layer}, and the encoder has {layers} layers; allowed are 1 to {layers}, or none "
                "for the last."
            )
        score_cache.check(recipe, ranks)
