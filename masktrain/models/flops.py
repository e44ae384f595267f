# SPDX-License-Identifier: Apache-2.0
"""What a step of MAE-AST costs: floating-point operations of its matrix products, and bytes kept for
backward.

A multiply-add counts as two operations. Norms, activations, dropout and the losses are left out, as is what
an implementation computes twice: these are the operations that the method needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from masktrain.models.mae_ast import MaeAst, MaeAstConfig
from masktrain.types import MaskPlan


def block_flops(lengths: Sequence[int], width: int, ffn_width: int) -> int:
    """Return the forward operations of one block over clips of the given lengths."""
    linear = 2 * sum(lengths) * (4 * width * width + 2 * width * ffn_width)
    attention = 4 * width * sum(n * n for n in lengths)
    return linear + attention


def forward_flops(
    config: MaeAstConfig,
    patch_values: int,
    n_visible: Sequence[int],
    n_tokens: Sequence[int],
    layers: tuple[int, int] | None = None,
) -> int:
    """Return the forward operations for clips of n_tokens tokens each, n_visible of them visible.

    layers: blocks of encoder and decoder that run; None: all.
    """
    encoder_layers, decoder_layers = layers or (config.encoder_layers, config.decoder_layers)
    visible, tokens = sum(n_visible), sum(n_tokens)
    width, decoder_width = config.embed_dim, config.decoder_embed_dim
    total = 2 * visible * patch_values * width
    total += encoder_layers * block_flops(n_visible, width, config.ffn_dim)
    total += decoder_layers * block_flops(n_tokens, decoder_width, config.decoder_ffn_dim)
    if config.has_bridge:
        total += 2 * visible * width * decoder_width
    return total + 2 * 2 * (tokens - visible) * decoder_width * patch_values


def train_flops(model: MaeAst, plan: MaskPlan, layers: tuple[int, int] | None = None) -> int:
    """Return the operations of forward and backward for one plan: three times forward, but the patch
    embedding has no gradient of its input. layers: as for forward_flops."""
    values = model.grid.patch_values
    forward = forward_flops(model.config, values, plan.n_visible, plan.layout.lengths, layers)
    return 3 * forward - 2 * sum(plan.n_visible) * values * model.config.embed_dim


def activation_bytes(model: MaeAst, tokens: int, clips: int, mask_ratio: float = 0.75) -> int:
    """Return the bytes that forward keeps for backward in float32, for `clips` clips of `tokens` tokens each.

    A block keeps per row: its input, q, k, v, the attention output and its log-sum-exp, the inputs of both
    norms, the output of the first, and the hidden values before and after GELU. Half precision keeps less.
    """
    config, values = model.config, model.grid.patch_values
    visible = clips * max(1, int(tokens * (1 - mask_ratio)))
    rows = clips * tokens
    encoder = visible * _block_values(config.embed_dim, config.ffn_dim, config.heads)
    decoder = rows * _block_values(config.decoder_embed_dim, config.decoder_ffn_dim, config.decoder_heads)
    total = visible * (values + config.embed_dim)
    total += config.encoder_layers * encoder + config.decoder_layers * decoder
    total += rows * config.decoder_embed_dim
    # the heads' input, both predictions, and the target of the matching loss
    total += (rows - visible) * (config.decoder_embed_dim + 3 * values)
    return 4 * total


def _block_values(width: int, ffn_width: int, heads: int) -> int:
    """Values kept per row: input, q, k, v, attention output, two norm inputs, the first's output; norm
    statistics."""
    return 8 * width + 2 * ffn_width + heads + 4
