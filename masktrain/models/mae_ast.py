# SPDX-License-Identifier: Apache-2.0
"""MAE-AST: an encoder over visible patches, a shallow decoder over all, two linear heads on the masked ones.

Baade, Peng and Harwath, "MAE-AST: Masked Autoencoding Audio Spectrogram Transformer", Interspeech 2022; code
AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py at 287574d. Only visible patches are read, projected and
encoded: the reference embeds all patches first and then drops the masked ones, which gives the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from masktrain.errors import ConfigError
from masktrain.kernels.mask_scatter import mask_scatter
from masktrain.models.flops import block_values, stack_flops
from masktrain.models.input_norm import InputNorm, InputNormConfig
from masktrain.models.positions import Positions, sincos_table
from masktrain.models.pretrainer import EncoderInput, Leading, Prediction, Pretrainer
from masktrain.models.transformer import STACK_SITES, Stack, StackConfig, drop
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid

# Dropout sites (masktrain/models/transformer.py lists those of a stack).
SITE_INPUT = 0
SITE_ENCODER = STACK_SITES
SITE_DECODER = 2 * STACK_SITES


@dataclass(frozen=True, kw_only=True)
class MaeAstConfig:
    """Size, norm and dropout of MAE-AST; the defaults are the published 12-layer model."""

    encoder_layers: int = 12
    """Blocks of the encoder."""
    embed_dim: int = 768
    """Width of the encoder."""
    ffn_dim: int = 3072
    """Hidden width of the feed-forward parts of the encoder."""
    heads: int = 12
    """Attention heads of the encoder."""
    decoder_layers: int = 2
    """Blocks of the decoder."""
    decoder_embed_dim: int = 768
    """Width of the decoder; where it differs from embed_dim a linear layer stands between."""
    decoder_ffn_dim: int = 3072
    """Hidden width of the feed-forward parts of the decoder."""
    decoder_heads: int = 12
    """Attention heads of the decoder."""
    bridge: bool = False
    """A linear layer between encoder and decoder also where their widths agree."""
    norm: Literal["post", "pre"] = "post"
    """LayerNorm after each half of a block, as published, or before it."""
    dropout: float = 0.1
    """Dropout of the rows that enter a stack and of the output of each half of a block."""
    attention_dropout: float = 0.1
    """Dropout of attention weights."""
    activation_dropout: float = 0.0
    """Dropout of the hidden values of the feed-forward parts."""
    dropout_input: float = 0.1
    """Dropout of patch embeddings."""
    encoder_layerdrop: float = 0.05
    """Probability that a block of the encoder is skipped in a step."""
    decoder_layerdrop: float = 0.0
    """Probability that a block of the decoder is skipped in a step."""

    def __post_init__(self) -> None:
        sizes = (
            "encoder_layers",
            "embed_dim",
            "ffn_dim",
            "heads",
            "decoder_layers",
            "decoder_embed_dim",
            "decoder_ffn_dim",
            "decoder_heads",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: must be at least 1; received {getattr(self, name)}.")
        for width, heads in (("embed_dim", "heads"), ("decoder_embed_dim", "decoder_heads")):
            w, h = getattr(self, width), getattr(self, heads)
            if w % h or w % 2:
                raise ConfigError(
                    f"model.{width}: must be even and a multiple of model.{heads}; received {w} and {h}."
                )
        for name in ("encoder_layers", "decoder_layers"):
            if 8 * (getattr(self, name) + 1) > STACK_SITES:
                raise ConfigError(f"model.{name}: must be below 512; received {getattr(self, name)}.")
        for name in (
            "dropout",
            "attention_dropout",
            "activation_dropout",
            "dropout_input",
            "encoder_layerdrop",
            "decoder_layerdrop",
        ):
            # dropout is exact to 1/65536, and 1 would drop everything
            if not 0 <= getattr(self, name) < 0.9999:
                raise ConfigError(f"model.{name}: must lie in [0, 0.9999); received {getattr(self, name)}.")

    masks: ClassVar[int] = 1

    @property
    def has_bridge(self) -> bool:
        """Whether a linear layer stands between encoder and decoder."""
        return self.bridge or self.decoder_embed_dim != self.embed_dim

    @property
    def may_drop_layers(self) -> bool:
        """Whether a step may leave parameters without a gradient."""
        return self.encoder_layerdrop > 0 or self.decoder_layerdrop > 0


def _size(width: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "encoder_layers": layers,
        "embed_dim": width,
        "ffn_dim": 4 * width,
        "heads": heads,
        "decoder_layers": 2,
        "decoder_embed_dim": width,
        "decoder_ffn_dim": 4 * width,
        "decoder_heads": heads,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _size(128, 4, 6),
    "small": _size(384, 6, 12),
    "base": _size(768, 12, 12),
}
"""The fields of MaeAstConfig that a named size sets; "base" is the published one."""


class MaeAst(Pretrainer):
    """The model of one token grid; see the module."""

    def __init__(self, config: MaeAstConfig, grid: TokenGrid, input_norm: InputNormConfig) -> None:
        """Initial weights come from torch's global generator, as the reference draws them: patch projection,
        bridge and heads torch's default, mask token uniform in [0, 1), stacks as BERT."""
        super().__init__()
        self.config = config
        self.grid = grid
        self.input_norm = InputNorm(input_norm, bins=grid.freq * grid.patch_freq)
        self.patch_embed = nn.Linear(grid.patch_values, config.embed_dim)
        shared: dict[str, Any] = {
            "norm": config.norm,
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "activation_dropout": config.activation_dropout,
        }
        self.encoder = Stack(
            StackConfig(
                layers=config.encoder_layers,
                width=config.embed_dim,
                ffn_width=config.ffn_dim,
                heads=config.heads,
                layerdrop=config.encoder_layerdrop,
                base=SITE_ENCODER,
                **shared,
            )
        )
        self.bridge = nn.Linear(config.embed_dim, config.decoder_embed_dim) if config.has_bridge else None
        self.mask_token = nn.Parameter(torch.rand(config.decoder_embed_dim))
        self.decoder = Stack(
            StackConfig(
                layers=config.decoder_layers,
                width=config.decoder_embed_dim,
                ffn_width=config.decoder_ffn_dim,
                heads=config.decoder_heads,
                layerdrop=config.decoder_layerdrop,
                base=SITE_DECODER,
                **shared,
            )
        )
        self.reconstruction_head = nn.Linear(config.decoder_embed_dim, grid.patch_values)
        self.matching_head = nn.Linear(config.decoder_embed_dim, grid.patch_values)
        self.encoder_positions = Positions(sincos_table, config.embed_dim)
        self.decoder_positions = Positions(sincos_table, config.decoder_embed_dim)

    def forward(
        self,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
        key: StepKey | None,
    ) -> Prediction:
        """See Pretrainer. encoder_out: (V, embed_dim), visible tokens ascending."""
        self._check(plans)
        (plan,) = plans
        key = key if self.training else None
        encoder_out = self.encode(spectrogram, plan, mean, scale, key)
        x = self.decode(encoder_out, plan, key, plan.masked)
        return Prediction(encoder_out, self.reconstruction_head(x), self.matching_head(x))

    def encode(
        self, spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, key: StepKey | None
    ) -> Tensor:
        """Return (V, embed_dim) of the visible tokens, ascending."""
        x, rows, _ = self.encoder_input(spectrogram, plan, mean, scale, key)
        return self.encoder(x, rows, key)

    def encoder_input(
        self, spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, key: StepKey | None
    ) -> EncoderInput:
        """See Pretrainer."""
        layout = plan.layout
        seen = Leading(layout, 0).rows(plan.visible, plan.cu_visible, plan.n_visible)
        x = self.patch_embed(self.read_patches(spectrogram, layout, plan.visible, mean, scale))
        x = drop(x, self.config.dropout_input, seen, key, SITE_INPUT)
        longest = max(layout.lengths, default=0)
        x = x + self.encoder_positions.at(seen.positions, longest, self.patch_embed.weight.dtype)
        return EncoderInput(x, seen, 0)

    def decode(
        self, encoder_out: Tensor, plan: MaskPlan, key: StepKey | None, wanted: Tensor | None
    ) -> Tensor:
        """Return (K, decoder_embed_dim) of the wanted tokens (K,), ids that count through the batch; None: all."""
        layout = plan.layout
        rows = Leading(layout, 0).rows(None, layout.cu_tokens, layout.lengths)
        x = encoder_out if self.bridge is None else self.bridge(encoder_out)
        x = mask_scatter(x, self.mask_token, plan.visible, plan.masked)
        longest = max(layout.lengths, default=0)
        x = x + self.decoder_positions.at(rows.positions, longest, self.mask_token.dtype)
        return self.decoder(x, rows, key, wanted)

    def active_layers(self, key: StepKey | None) -> tuple[int, int]:
        """Return how many blocks of encoder and decoder run in the step of `key`; all for None."""
        return len(self.encoder.active(key)), len(self.decoder.active(key))

    def train_flops(self, plans: Sequence[MaskPlan], key: StepKey | None = None) -> int:
        """See Pretrainer: three times forward, but the patch embedding has no gradient of its input."""
        (plan,) = plans
        layers = self.active_layers(key)
        forward = forward_flops(
            self.config, self.grid.patch_values, plan.n_visible, plan.layout.lengths, layers
        )
        return 3 * forward - 2 * sum(plan.n_visible) * self.grid.patch_values * self.config.embed_dim

    def activation_bytes(self, tokens: int, clips: int, mask_ratio: float) -> int:
        """See Pretrainer."""
        config, values = self.config, self.grid.patch_values
        visible = clips * max(1, int(tokens * (1 - mask_ratio)))
        rows = clips * tokens
        encoder = visible * block_values(config.embed_dim, config.ffn_dim, config.heads)
        decoder = rows * block_values(config.decoder_embed_dim, config.decoder_ffn_dim, config.decoder_heads)
        total = visible * (values + config.embed_dim)
        total += config.encoder_layers * encoder + config.decoder_layers * decoder
        total += rows * config.decoder_embed_dim
        # the heads' input, both predictions, and the target of the matching loss
        total += (rows - visible) * (config.decoder_embed_dim + 3 * values)
        # behind the last attention only masked rows are kept
        hidden = 4 * config.decoder_embed_dim + 2 * config.decoder_ffn_dim
        return 4 * (total - visible * hidden)


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
    visible, masked = sum(n_visible), sum(n_tokens) - sum(n_visible)
    width, decoder_width = config.embed_dim, config.decoder_embed_dim
    total = 2 * visible * patch_values * width
    total += stack_flops(n_visible, width, config.ffn_dim, encoder_layers)
    total += stack_flops(n_tokens, decoder_width, config.decoder_ffn_dim, decoder_layers, masked)
    if config.has_bridge:
        total += 2 * visible * width * decoder_width
    return total + 2 * 2 * masked * decoder_width * patch_values
