# SPDX-License-Identifier: Apache-2.0
"""MAE-AST: an encoder over visible patches, a shallow decoder over all, two linear heads on the masked ones.

Baade, Peng and Harwath, "MAE-AST: Masked Autoencoding Audio Spectrogram Transformer", Interspeech 2022; code
AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py at 287574d. Only visible patches are read, projected and
encoded: the reference embeds all patches first and then drops the masked ones, which gives the same values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from masktrain.errors import ConfigError
from masktrain.kernels.mask_gather import mask_gather
from masktrain.kernels.mask_scatter import mask_scatter
from masktrain.models.input_norm import InputNorm, InputNormConfig
from masktrain.models.positions import SinCosPositions
from masktrain.models.transformer import STACK_SITES, Rows, Stack, StackConfig, drop
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


class MaeAstOutput(NamedTuple):
    """encoder_out: (V, embed_dim), visible tokens ascending. decoder_out: (N, decoder_embed_dim), all tokens.
    pred_recon, pred_class: (M, P), masked tokens ascending: reconstruction and matching head."""

    encoder_out: Tensor
    decoder_out: Tensor
    pred_recon: Tensor
    pred_class: Tensor


class MaeAst(nn.Module):
    """The model of one token grid; see the module."""

    def __init__(self, config: MaeAstConfig, grid: TokenGrid, input_norm: InputNormConfig) -> None:
        """Initial weights come from torch's global generator, as the reference draws them: patch projection,
        bridge and heads torch's default, mask token uniform in [0, 1), stacks as BERT."""
        super().__init__()
        self.config = config
        self.grid = grid
        self.input_norm = InputNorm(input_norm)
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
        self.encoder_positions = SinCosPositions(config.embed_dim)
        self.decoder_positions = SinCosPositions(config.decoder_embed_dim)

    def forward(
        self, spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, key: StepKey | None
    ) -> MaeAstOutput:
        """Predict the masked patches.

        mean, scale: of the input norm, in the dtype of the frames. key: keys dropout and layerdrop in
        training mode; None, or evaluation mode, drops nothing.
        """
        layout, grid = plan.layout, self.grid
        if layout.grid != grid:
            raise ValueError(f"MaeAst: the plan was made for {layout.grid}, the model for {grid}.")
        key = key if self.training else None
        longest = max(layout.lengths, default=0)
        device = spectrogram.frames.device
        all_rows = rows_of(None, layout.cu_tokens, layout.lengths, layout.cu_tokens, layout.clip_ids)
        seen = rows_of(plan.visible, plan.cu_visible, plan.n_visible, layout.cu_tokens, layout.clip_ids)

        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.patch_embed.weight.dtype
        patches = mask_gather(
            spectrogram.frames,
            layout.cu_frames,
            layout.cu_tokens,
            plan.visible,
            mean=mean,
            scale=scale,
            freq=grid.freq,
            patch_freq=grid.patch_freq,
            patch_time=grid.patch_time,
            order=grid.order,
            dtype=dtype,
        )
        x = drop(self.patch_embed(patches), self.config.dropout_input, seen, key, SITE_INPUT)
        x = x + self.encoder_positions.at(seen.positions, longest, self.patch_embed.weight.dtype)
        encoder_out = self.encoder(x, seen, key)

        x = encoder_out if self.bridge is None else self.bridge(encoder_out)
        x = mask_scatter(x, self.mask_token, plan.visible, plan.masked)
        x = x + self.decoder_positions.at(all_rows.positions, longest, self.mask_token.dtype)
        decoder_out = self.decoder(x, all_rows, key)

        x = decoder_out.index_select(0, plan.masked)
        return MaeAstOutput(encoder_out, decoder_out, self.reconstruction_head(x), self.matching_head(x))

    def active_layers(self, key: StepKey | None) -> tuple[int, int]:
        """Return how many blocks of encoder and decoder run in the step of `key`; all for None."""
        return len(self.encoder.active(key)), len(self.decoder.active(key))


def rows_of(
    tokens: Tensor | None, cu: Tensor, lengths: tuple[int, ...], cu_tokens: Tensor, clip_ids: Tensor
) -> Rows:
    """Return the Rows of the given tokens (N,), ids that count through the batch; None for all of them.

    cu, lengths: of these tokens in each clip. cu_tokens: of all tokens.
    """
    total = sum(lengths)
    counts = (cu[1:] - cu[:-1]).long()
    clip = torch.repeat_interleave(counts, output_size=total)
    if tokens is None:
        tokens = torch.arange(total, device=cu.device)
    positions = tokens.long() - cu_tokens.long().index_select(0, clip)
    return Rows(cu, lengths, clip_ids, clip_ids.index_select(0, clip), positions)
