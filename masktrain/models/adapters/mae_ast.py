# SPDX-License-Identifier: Apache-2.0
"""Weights of AlanBaade/MAE-AST-Public under their own names, to ours and back.

The reference keeps q, k and v apart, ours are the rows of one matrix in that order. Left out are what its
forward pass never uses (`layer_norm.*`, and `encoder_mask_emb`, whose tokens are dropped at once), the
position tables, which we compute, and the batch counter of its batch norm.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from masktrain.errors import CheckpointError
from masktrain.models.adapters.naming import export_named, import_named
from masktrain.models.mae_ast import MaeAstConfig

IGNORED = (
    "layer_norm.weight",
    "layer_norm.bias",
    "encoder_mask_emb",
    "enc_sine_pos_embed.pe",
    "dec_sine_pos_embed.pe",
    "batch_norm.num_batches_tracked",
)
"""Names of the reference that have no counterpart here."""

_TOP = {
    "mask_token": "decoder_mask_emb",
    "patch_embed": "post_extract_proj",
    "bridge": "post_enc_proj",
    "reconstruction_head": "final_proj_reconstruction",
    "matching_head": "final_proj_classification",
    "input_norm.running_mean": "batch_norm.running_mean",
    "input_norm.running_var": "batch_norm.running_var",
}
_BLOCK = {
    "out": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "fc1": "fc1",
    "fc2": "fc2",
    "ffn_norm": "final_layer_norm",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def reference_names(name: str) -> tuple[str, ...]:
    """Return the reference's name of one of our parameters or buffers; the three of q, k and v for a qkv."""
    if name in _TOP:
        return (_TOP[name],)
    module, _, leaf = name.rpartition(".")
    if module in _TOP:
        return (f"{_TOP[module]}.{leaf}",)
    stack, _, rest = module.partition(".")
    if stack in ("encoder", "decoder"):
        if rest == "norm":
            return (f"{stack}.layer_norm.{leaf}",)
        _, layer, part = rest.split(".")
        prefix = f"{stack}.layers.{layer}"
        if part == "qkv":
            return tuple(f"{prefix}.self_attn.{one}.{leaf}" for one in _QKV)
        return (f"{prefix}.{_BLOCK[part]}.{leaf}",)
    raise KeyError(name)


def export_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of MaeAst (or its gradients) under the reference's names."""
    return export_named(state, reference_names)


def config_from_state(state: Mapping[str, Tensor], *, heads: int) -> MaeAstConfig:
    """Return the model that a state dict of the reference belongs to; no weight tells the number of heads.

    Raises CheckpointError for one that is no MAE-AST.
    """
    try:
        layers = {stack: _layers(state, stack) for stack in ("encoder", "decoder")}
        width = state["post_extract_proj.weight"].shape[0]
        return MaeAstConfig(
            encoder_layers=layers["encoder"],
            embed_dim=width,
            ffn_dim=state["encoder.layers.0.fc1.weight"].shape[0],
            heads=heads,
            decoder_layers=layers["decoder"],
            decoder_embed_dim=state["decoder_mask_emb"].shape[0],
            decoder_ffn_dim=state["decoder.layers.0.fc1.weight"].shape[0],
            decoder_heads=heads,
            bridge="post_enc_proj.weight" in state,
        )
    except KeyError as missing:
        raise CheckpointError(
            f"weights: no {missing} among {len(state)} names; expected a state dict of MAE-AST-Public."
        ) from None


def _layers(state: Mapping[str, Tensor], stack: str) -> int:
    prefix = f"{stack}.layers."
    return 1 + max(
        (int(k.removeprefix(prefix).split(".")[0]) for k in state if k.startswith(prefix)), default=-1
    )


def import_state(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the reference's `state` under our names and with the shapes of `wanted`, a state dict of MaeAst.

    Raises CheckpointError naming every key that is missing, unknown (IGNORED apart) or of another shape.
    """
    return import_named(state, wanted, reference_names, IGNORED)
