# SPDX-License-Identifier: Apache-2.0
"""Weights of facebookresearch/mae's descendants under their own names, to ours and back: MaskSpec, MSM-MAE, the MAE
of the M2D repository, and AudioMAE.

Ignored are the position tables, which we compute, and M2D's normalisation statistics, which travel in the config.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from masktrain.models.adapters.naming import export_named, import_named
from masktrain.types import TokenGrid

IGNORED = ("pos_embed", "decoder_pos_embed", "norm_stats")
"""Names of the references that have no counterpart among our weights."""

_TOP = {
    "cls_token": "cls_token",
    "mask_token": "mask_token",
    "patch_embed": "patch_embed.proj",
    "bridge": "decoder_embed",
    "reconstruction_head": "decoder_pred",
}
_STACK = {"encoder": ("blocks", "norm"), "decoder": ("decoder_blocks", "decoder_norm")}
BLOCK = {
    "qkv": "attn.qkv",
    "qkv.linear": "attn.qkv",
    "out": "attn.proj",
    "attention_norm": "norm1",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "ffn_norm": "norm2",
    "position_fc1": "attn.meta_mlp.fc1",
    "position_fc2": "attn.meta_mlp.fc2",
}
"""Parts of our block by their names in timm's."""


def reference_names(name: str) -> tuple[str, ...]:
    """Return the reference's name of one of our parameters. Raises KeyError for what it has none of."""
    if name in _TOP:
        return (_TOP[name],)
    module, _, leaf = name.rpartition(".")
    if module in _TOP:
        return (f"{_TOP[module]}.{leaf}",)
    stack, _, rest = module.partition(".")
    blocks, norm = _STACK[stack]
    if rest == "norm":
        return (f"{norm}.{leaf}",)
    _, layer, *part = rest.split(".", 2)
    if leaf in ("q_bias", "v_bias", "tau"):
        return (f"{blocks}.{layer}.attn.{leaf}",)
    return (f"{blocks}.{layer}.{BLOCK[part[0]]}.{leaf}",)


def export_state(state: Mapping[str, Tensor], grid: TokenGrid) -> dict[str, Tensor]:
    """Return a state dict of Mae (or its gradients) under the reference's names and in its shapes."""
    return export_named(_learned(state), reference_names, lambda n, s: reference_shape(n, s, grid))


def import_state(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], grid: TokenGrid
) -> dict[str, Tensor]:
    """Return the reference's `state` under our names and with the shapes of `wanted`, a state dict of Mae.

    The statistics of the input norm are not among a reference's weights: those of `wanted` are returned. Raises
    CheckpointError naming every key that is missing, unknown (IGNORED apart) or of another shape.
    """
    learned = import_named(
        state, _learned(wanted), reference_names, IGNORED, lambda n, s: reference_shape(n, s, grid)
    )
    return {name: learned.get(name, tensor) for name, tensor in wanted.items()}


def _learned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith("input_norm.")}


def reference_shape(name: str, shape: tuple[int, ...], grid: TokenGrid) -> tuple[int, ...]:
    """Return the shape that one of our parameters has in the reference: a convolution for the patch projection, its
    kernel's axes in the order of the patch's values, and tokens with an axis more."""
    if name.endswith("patch_embed.proj.weight"):
        patch = (
            (grid.patch_time, grid.patch_freq) if grid.order == "time" else (grid.patch_freq, grid.patch_time)
        )
        return (shape[0], 1, *patch)
    return (1, *shape) if name.endswith("_token") else shape
