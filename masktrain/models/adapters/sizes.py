# SPDX-License-Identifier: Apache-2.0
"""The fields of a model's config that the weights of a reference project tell, by their names and shapes.

A field whose weights are absent is left out. The number of heads stands in no shape, apart from AudioMAE's window
decoder; the columns of learned positions depend on the token grid and are told in registry.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]


def mae_sizes(state: State) -> dict[str, Any]:
    """Return fields of MaeConfig for a state dict of MaskSpec, MSM-MAE or AudioMAE."""
    out: dict[str, Any] = {
        "encoder_layers": _layers(state, "blocks"),
        "embed_dim": _size(state, "patch_embed.proj.weight"),
        "ffn_dim": _size(state, "blocks.0.mlp.fc1.weight"),
        "decoder_layers": _layers(state, "decoder_blocks"),
        "decoder_embed_dim": _size(state, "decoder_embed.weight"),
        "decoder_ffn_dim": _size(state, "decoder_blocks.0.mlp.fc1.weight"),
        "decoder_heads": _size(state, "decoder_blocks.0.attn.tau"),
        "cls_token": "cls_token" in state,
    }
    if "blocks.0.attn.qkv.weight" in state:
        out["key_bias"] = "blocks.0.attn.q_bias" not in state
    if "decoder_blocks.0.attn.qkv.weight" in state:
        out["decoder"] = "window" if "decoder_blocks.0.attn.tau" in state else "global"
    return _known(out)


def mae_ast_sizes(state: State) -> dict[str, Any]:
    """Return fields of MaeAstConfig for a state dict of MAE-AST-Public."""
    return _known(
        {
            "encoder_layers": _layers(state, "encoder.layers"),
            "embed_dim": _size(state, "post_extract_proj.weight"),
            "ffn_dim": _size(state, "encoder.layers.0.fc1.weight"),
            "decoder_layers": _layers(state, "decoder.layers"),
            "decoder_embed_dim": _size(state, "decoder_mask_emb"),
            "decoder_ffn_dim": _size(state, "decoder.layers.0.fc1.weight"),
            "bridge": "post_enc_proj.weight" in state,
        }
    )


def ssast_sizes(state: State) -> dict[str, Any]:
    """Return fields of SsastConfig for a state dict of YuanGongND/ssast."""
    return _known(
        {
            "encoder_layers": _layers(state, "v.blocks"),
            "embed_dim": _size(state, "v.patch_embed.proj.weight"),
            "ffn_dim": _size(state, "v.blocks.0.mlp.fc1.weight"),
        }
    )


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _size(state: State, name: str, axis: int = 0) -> int | None:
    tensor = state.get(name)
    return None if tensor is None or tensor.dim() <= axis else tensor.shape[axis]


def _layers(state: State, prefix: str) -> int | None:
    """Return one more than the highest number of a block; those between that are absent are named later."""
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d{{1,4}})\.")
    numbers = [int(match[1]) for match in map(pattern.match, state) if match]
    return max(numbers) + 1 if numbers else None
