# SPDX-License-Identifier: Apache-2.0
"""SSAST: a ViT over all tokens of a clip, the masked ones replaced by a learned vector, and two heads on these.

Gong et al., "SSAST: Self-Supervised Audio Spectrogram Transformer", AAAI 2022; code YuanGongND/ssast:
src/models/ast_models.py at a1a3eec, whose backbone is the distilled DeiT of timm 0.4.5: a class and a distillation
token before the patches, learned positions, LayerNorm before each half of a block. One head is matched against the
patches, the other reconstructs them. The code gives each its own mask and its own pass through the encoder.

Here the passes of a batch are one call on packed clips, only visible patches are read and embedded (the reference
embeds all, then replaces), and behind the last attention only masked tokens are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masktrain.errors import ConfigError
from masktrain.models.flops import block_values, stack_flops
from masktrain.models.input_norm import InputNorm, InputNormConfig
from masktrain.models.positions import grid_coordinates
from masktrain.models.pretrainer import EncoderInput, Leading, Prediction, Pretrainer
from masktrain.models.transformer import STACK_SITES, Rows, Stack, StackConfig
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, TokenLayout

LEADING = 2
"""Rows before the tokens of a clip: class token, distillation token."""
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class SsastConfig:
    """Size and form of SSAST; the defaults are the published base model on 16 x 16 patches."""

    encoder_layers: int = 12
    """Blocks of the encoder."""
    embed_dim: int = 768
    """Width of the encoder."""
    ffn_dim: int = 3072
    """Hidden width of the feed-forward parts of the encoder."""
    heads: int = 12
    """Attention heads of the encoder."""
    passes: Literal[1, 2] = 2
    """Passes through the encoder: one for each head, under masks of its own, as published; or one for both, at half
    the cost."""
    columns: int = 64
    """Time columns of the learned positions; clips of fewer use the first of them, longer clips are refused."""

    may_drop_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("encoder_layers", "embed_dim", "ffn_dim", "heads", "columns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: must be at least 1; received {getattr(self, name)}.")
        if self.embed_dim % self.heads:
            raise ConfigError(
                f"model.embed_dim: must be a multiple of model.heads; received {self.embed_dim} and {self.heads}."
            )
        if 8 * (self.encoder_layers + 1) > STACK_SITES:
            raise ConfigError(f"model.encoder_layers: must be below 512; received {self.encoder_layers}.")
        if self.passes not in (1, 2):
            raise ConfigError(f"model.passes: must be 1 or 2; received {self.passes!r}.")

    @property
    def masks(self) -> int:
        """Masks a clip and step: one for each pass."""
        return self.passes


class Ssast(Pretrainer):
    """The model of one token grid; see the module."""

    config: SsastConfig

    def __init__(self, config: SsastConfig, grid: TokenGrid, input_norm: InputNormConfig) -> None:
        """Initial weights come from torch's global generator, as the reference draws them: matrices of the encoder,
        positions, class and distillation token N(0, 0.02) and biases 0 (timm's DeiT), mask token Xavier-normal of
        shape (1, 1, width), patch projection and heads torch's default."""
        super().__init__()
        self.config = config
        self.grid = grid
        self.input_norm = InputNorm(input_norm, bins=grid.freq * grid.patch_freq)
        width, values = config.embed_dim, grid.patch_values
        self.patch_embed = nn.Linear(values, width)
        # two dimensions, as the tokens of the other models
        self.cls_token = nn.Parameter(torch.empty(1, width))
        self.dist_token = nn.Parameter(torch.empty(1, width))
        self.mask_token = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, 1, width))[0])
        self.positions = nn.Parameter(torch.empty(LEADING + grid.freq * config.columns, width))
        for drawn in (self.cls_token, self.dist_token, self.positions):
            nn.init.trunc_normal_(drawn, std=0.02)
        self.encoder = Stack(
            StackConfig(
                layers=config.encoder_layers,
                width=width,
                ffn_width=config.ffn_dim,
                heads=config.heads,
                norm="pre",
                dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                layerdrop=0.0,
                base=STACK_SITES,
                eps=EPS,
                init="trunc_normal",
            )
        )
        self.matching_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, values))
        self.reconstruction_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, values))

    def check_columns(self, columns: int) -> None:
        """See Pretrainer."""
        if columns > self.config.columns:
            raise ConfigError(
                f"model.columns: the learned positions end after {self.config.columns} time columns, and clips have "
                f"up to {columns} of {self.grid.patch_time} frames. Set model.columns to {columns}, or take shorter "
                "clips (data.clip_seconds, data.target_length)."
            )

    def forward(
        self,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
        key: StepKey | None,
    ) -> Prediction:
        """See Pretrainer. encoder_out: (M, embed_dim), the masked tokens of the first plan and then those of the
        second, if there is one; the other rows are not computed to the end."""
        self._check(plans)
        encoder_out = self.encode(spectrogram, plans, mean, scale, masked_only=True)
        parts = encoder_out.split([sum(plan.n_masked) for plan in plans])
        return Prediction(encoder_out, self.reconstruction_head(parts[-1]), self.matching_head(parts[0]))

    def encode(
        self,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
        *,
        masked_only: bool = False,
    ) -> Tensor:
        """Return the output of the encoder under each of the plans: (R, embed_dim), plan by plan, clip by clip, the
        class token, the distillation token and all tokens; with masked_only the masked tokens alone, plan by plan."""
        x, rows = self._rows_of(spectrogram, plans, mean, scale)
        if not masked_only:
            return self.encoder(x, rows, None)
        layout = plans[0].layout
        place = Leading(_repeated(layout, len(plans)), LEADING)
        keep = place.all_slots(_all_ids(layout, [plan.masked for plan in plans]))
        return self.encoder(x, rows, None, keep)

    def encoder_input(
        self, spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, key: StepKey | None
    ) -> EncoderInput:
        """See Pretrainer: the encoder reads all tokens, the mask token in place of masked ones."""
        x, rows = self._rows_of(spectrogram, (plan,), mean, scale)
        return EncoderInput(x, rows, LEADING)

    def _rows_of(
        self, spectrogram: Spectrogram, plans: tuple[MaskPlan, ...], mean: Tensor, scale: Tensor
    ) -> tuple[Tensor, Rows]:
        """Return what the encoder reads under each of the plans, as `encode` returns it, and whose rows these are."""
        layout = plans[0].layout
        self.check_columns(max(layout.columns, default=0))
        visible = _all_ids(layout, [plan.visible for plan in plans])
        layouts = _repeated(layout, len(plans))
        place = Leading(layouts, LEADING)
        rows = place.rows(None, layouts.cu_tokens, layouts.lengths)

        # Every row but a visible token's is a function of its position: one lookup in a small table writes them all,
        # and its backward adds up the gradients of positions and tokens in a fixed order.
        masked_rows = self.mask_token.expand(len(self.positions) - LEADING, -1)
        without_patch = self.positions + torch.cat([self.cls_token, self.dist_token, masked_rows])
        table = torch.cat([without_patch, self.positions])
        outer, inner = grid_coordinates(layouts)
        stride = self.config.columns if self.grid.order == "freq" else self.grid.freq
        entries = LEADING + outer * stride + inner
        entries = entries.index_add(0, visible, torch.full_like(visible, len(self.positions)))
        first = torch.arange(LEADING, device=entries.device).repeat(len(layouts.lengths))
        lookup = entries.new_empty(len(first) + len(entries))
        lookup = lookup.index_copy(0, place.leading(layouts.cu_tokens), first)
        lookup = lookup.index_copy(0, place.slots(place.clip), entries)
        x = F.embedding(lookup, table)
        tokens = torch.cat([plan.visible for plan in plans])
        patches = self.patch_embed(self.read_patches(spectrogram, layout, tokens, mean, scale))
        return x.index_add(0, place.all_slots(visible), patches.to(x.dtype)), rows

    def train_flops(self, plans: Sequence[MaskPlan], key: StepKey | None = None) -> int:
        """See Pretrainer: three times forward, but the patch embedding has no gradient of its input."""
        config, values = self.config, self.grid.patch_values
        lengths = [n + LEADING for plan in plans for n in plan.layout.lengths]
        masked = [sum(plan.n_masked) for plan in plans]
        embed = 2 * sum(sum(plan.n_visible) for plan in plans) * values * config.embed_dim
        stack = stack_flops(lengths, config.embed_dim, config.ffn_dim, config.encoder_layers, sum(masked))
        heads = 2 * (masked[0] + masked[-1]) * config.embed_dim * (config.embed_dim + values)
        return 3 * (embed + stack + heads) - embed

    def activation_bytes(self, tokens: int, clips: int, mask_ratio: float) -> int:
        """See Pretrainer."""
        config, values = self.config, self.grid.patch_values
        width, passes = config.embed_dim, config.passes
        visible = clips * max(1, int(tokens * (1 - mask_ratio)))
        masked = clips * tokens - visible
        rows = clips * (tokens + LEADING)
        total = passes * visible * values
        total += passes * config.encoder_layers * rows * block_values(width, config.ffn_dim, config.heads)
        # behind the last attention only masked rows are kept
        total -= passes * (rows - masked) * (4 * width + 2 * config.ffn_dim)
        # the input of the last norm and of the heads; their hidden values, predictions, target of the matching loss
        total += passes * masked * 2 * width + masked * (2 * width + 3 * values)
        return 4 * total


def _repeated(layout: TokenLayout, times: int) -> TokenLayout:
    """Return the layout of a batch that holds all clips `times` times, one after another."""

    def again(cu: Tensor) -> Tensor:
        return torch.cat([cu, *(cu[1:] + i * cu[-1] for i in range(1, times))])

    return TokenLayout(
        grid=layout.grid,
        columns=layout.columns * times,
        lengths=layout.lengths * times,
        cu_tokens=again(layout.cu_tokens),
        cu_frames=again(layout.cu_frames),
        clip_ids=layout.clip_ids.repeat(times),
    )


def _all_ids(layout: TokenLayout, tokens: list[Tensor]) -> Tensor:
    """Return ids (K,) int64 of the repeated layout, given ids of each repetition in `layout`."""
    total = sum(layout.lengths)
    return torch.cat([ids.long() + i * total for i, ids in enumerate(tokens)])
