# SPDX-License-Identifier: Apache-2.0
"""Weights of YuanGongND/ssast under their own names, to ours and back.

Ignored are the size of the input, which travels in the config, and the class heads of the DeiT backbone, which
pretraining never uses.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from masktrain.errors import CheckpointError
from masktrain.models.adapters.mae import BLOCK
from masktrain.models.adapters.naming import export_named, import_named
from masktrain.types import TokenGrid

IGNORED = (
    "p_input_fdim",
    "p_input_tdim",
    "v.head.weight",
    "v.head.bias",
    "v.head_dist.weight",
    "v.head_dist.bias",
)
"""Names of the reference that have no counterpart here."""
PARALLEL = "module."
"""Prefix of all names in published checkpoints, which were saved out of DataParallel."""

_TOP = {
    "cls_token": "v.cls_token",
    "dist_token": "v.dist_token",
    "positions": "v.pos_embed",
    "mask_token": "mask_embed",
}
_MODULE = {
    "patch_embed": "v.patch_embed.proj",
    "encoder.norm": "v.norm",
    "matching_head": "cpredlayer",
    "reconstruction_head": "gpredlayer",
}


def reference_names(name: str) -> tuple[str, ...]:
    """Return the reference's name of one of our parameters. Raises KeyError for what it has none of."""
    if name in _TOP:
        return (_TOP[name],)
    for ours, theirs in _MODULE.items():
        if name.startswith(f"{ours}."):
            return (theirs + name.removeprefix(ours),)
    module, _, leaf = name.rpartition(".")
    if not module.startswith("encoder.blocks."):
        raise KeyError(name)
    layer, part = module.removeprefix("encoder.blocks.").split(".")
    return (f"v.blocks.{layer}.{BLOCK[part]}.{leaf}",)


def export_state(state: Mapping[str, Tensor], grid: TokenGrid) -> dict[str, Tensor]:
    """Return a state dict of Ssast (or its gradients) under the reference's names and in its shapes."""
    return export_named(_learned(state), reference_names, lambda n, s: reference_shape(n, s, grid))


def import_state(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], grid: TokenGrid
) -> dict[str, Tensor]:
    """Return the reference's `state` under our names and with the shapes of `wanted`, a state dict of Ssast.

    The statistics of the input norm are not among the reference's weights: those of `wanted` are returned. Raises
    CheckpointError naming every key that is missing, unknown (IGNORED apart) or of another shape.
    """
    plain = {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
    learned = import_named(
        plain, _learned(wanted), reference_names, IGNORED, lambda n, s: reference_shape(n, s, grid)
    )
    return {name: learned.get(name, tensor) for name, tensor in wanted.items()}


def _learned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("input_norm.")}


def reference_shape(name: str, shape: tuple[int, ...], grid: TokenGrid) -> tuple[int, ...]:
    """Return the shape that one of our parameters has in the reference: a convolution for the patch projection, and
    tokens and positions with an axis more. Raises CheckpointError for tokens that are not frequency-major: weights
    of patches and positions would fit in shape and be of others."""
    if grid.order != "freq":
        raise CheckpointError(
            f"weights: SSAST counts its tokens frequency-major; received tokens.order {grid.order!r}. Take 'freq'."
        )
    if name == "v.patch_embed.proj.weight":
        return (shape[0], 1, grid.patch_freq, grid.patch_time)
    return (1, *shape) if name in _TOP.values() else shape
