# SPDX-License-Identifier: Apache-2.0
"""The masked autoencoder of He et al. on spectrograms: MaskSpec, MSM-MAE and AudioMAE.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (facebookresearch/mae:models_mae.py); on
audio WangHelin1997/MaskSpec:models/models_mae.py, nttcslab/msm-mae, nttcslab/m2d and facebookresearch/AudioMAE:
models_mae.py. A ViT reads the visible patches and a class token, a narrower one all tokens, and a linear head
reconstructs the masked ones. Only visible patches are read, projected and encoded, in ascending order; the
references embed all, and encode the visible ones in the order of their random keys: positions are added before,
and attention does not see the order.
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
from masktrain.models.positions import (
    Positions,
    grid_coordinates,
    sincos_halves,
    sincos_table,
    within_clip,
)
from masktrain.models.pretrainer import EncoderInput, Leading, Prediction, Pretrainer
from masktrain.models.transformer import STACK_SITES, Stack, StackConfig, linear_init
from masktrain.models.window_decoder import (
    WindowDecoder,
    WindowDecoderConfig,
    Windows,
    position_values,
    window_flops,
    window_rows,
)
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, TokenLayout

SITE_ENCODER = STACK_SITES
SITE_DECODER = 2 * STACK_SITES
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class MaeConfig:
    """Size and form of a masked autoencoder; the defaults are MaskSpec's base model."""

    encoder_layers: int = 12
    """Blocks of the encoder."""
    embed_dim: int = 768
    """Width of the encoder, a multiple of 4."""
    ffn_dim: int = 3072
    """Hidden width of the feed-forward parts of the encoder."""
    heads: int = 12
    """Attention heads of the encoder."""
    decoder_layers: int = 8
    """Blocks of the decoder."""
    decoder_embed_dim: int = 512
    """Width of the decoder, a multiple of 4."""
    decoder_ffn_dim: int = 2048
    """Hidden width of the feed-forward parts of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    cls_token: bool = True
    """A class token, which goes through encoder and decoder and takes part in no loss."""
    key_bias: bool = True
    """Biases of q, k and v; without it of q and v alone (MSM-MAE's own code)."""
    positions: Literal["sincos_2d", "sincos_2d_transposed"] = "sincos_2d"
    """Fixed positions of the encoder: half of the channels for each axis, or the same with the axes of the grid
    swapped (AudioMAE's published weights)."""
    decoder_positions: Literal["sincos_2d", "sincos_2d_transposed", "sincos_1d"] = "sincos_2d"
    """Fixed positions of the decoder: as `positions`, or over the token's number (MSM-MAE's own code)."""
    decoder: Literal["global", "window"] = "global"
    """Attention of the decoder: over all tokens of a clip, or inside shifted windows of 4 x 4 tokens, without the
    class token (AudioMAE)."""
    position_dropout: float = 0.1
    """Dropout in the network that gives the position bias of the window decoder."""

    masks: ClassVar[int] = 1
    may_drop_layers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in (
            "encoder_layers",
            "embed_dim",
            "ffn_dim",
            "heads",
            "decoder_layers",
            "decoder_embed_dim",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: must be at least 1; received {getattr(self, name)}.")
        for name in ("decoder_ffn_dim", "decoder_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}: must be at least 1; received {getattr(self, name)}.")
        for width, heads in (("embed_dim", "heads"), ("decoder_embed_dim", "decoder_heads")):
            w, h = getattr(self, width), getattr(self, heads)
            if w % h or w % 4:
                raise ConfigError(
                    f"model.{width}: must be a multiple of 4 and of model.{heads}; received {w} and {h}."
                )
        for name in ("encoder_layers", "decoder_layers"):
            if 8 * (getattr(self, name) + 1) > STACK_SITES:
                raise ConfigError(f"model.{name}: must be below 512; received {getattr(self, name)}.")
        # dropout is exact to 1/65536, and 1 would drop everything
        if not 0 <= self.position_dropout < 0.9999:
            raise ConfigError(
                f"model.position_dropout: must lie in [0, 0.9999); received {self.position_dropout}."
            )


class GridPositions(nn.Module):
    """Fixed positions of tokens, by their place in the grid of their clip."""

    def __init__(self, kind: str, width: int) -> None:
        """kind: as the fields of MaeConfig."""
        super().__init__()
        self.kind = kind
        flat = kind == "sincos_1d"
        self.table = Positions(_float64_table, width) if flat else Positions(sincos_halves, width // 2)

    def of(self, layout: TokenLayout, tokens: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return (K, width) for tokens (K,), ids that count through the batch; None: all.

        Two dimensions: the first half of the channels is that of the inner number, the second of the outer one
        (facebookresearch/mae:util/pos_embed.py, whose meshgrid has the width first).
        """
        longest = max(layout.lengths, default=0)
        if self.kind == "sincos_1d":
            return self.table.at(within_clip(layout, tokens)[1], longest, dtype)
        outer, inner = grid_coordinates(layout, tokens, transposed=self.kind == "sincos_2d_transposed")
        return torch.cat([self.table.at(inner, longest, dtype), self.table.at(outer, longest, dtype)], dim=1)


def _float64_table(length: int, width: int) -> Tensor:
    return sincos_table(length, width, torch.float64)


class Mae(Pretrainer):
    """The model of one token grid; see the module."""

    config: MaeConfig

    def __init__(self, config: MaeConfig, grid: TokenGrid, input_norm: InputNormConfig) -> None:
        """Initial weights come from torch's global generator: matrices Xavier-uniform and biases 0, class and mask
        token N(0, 0.02), the bias of the patch projection as torch's (facebookresearch/mae:models_mae.py)."""
        super().__init__()
        self.config = config
        self.grid = grid
        self.input_norm = InputNorm(input_norm, bins=grid.freq * grid.patch_freq)
        self.patch_embed = nn.Linear(grid.patch_values, config.embed_dim)
        nn.init.xavier_uniform_(self.patch_embed.weight)
        # two dimensions: the references decay them, as they decay every parameter that is no vector
        self.cls_token = nn.Parameter(torch.empty(1, config.embed_dim)) if config.cls_token else None
        self.mask_token = nn.Parameter(torch.empty(1, config.decoder_embed_dim))
        for token in (self.cls_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        shared: dict[str, Any] = {
            "norm": "pre",
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "activation_dropout": 0.0,
            "layerdrop": 0.0,
            "eps": EPS,
            "init": "xavier",
            "key_bias": config.key_bias,
        }
        self.encoder = Stack(
            StackConfig(
                layers=config.encoder_layers,
                width=config.embed_dim,
                ffn_width=config.ffn_dim,
                heads=config.heads,
                base=SITE_ENCODER,
                **shared,
            )
        )
        self.bridge = nn.Linear(config.embed_dim, config.decoder_embed_dim)
        size: dict[str, Any] = {
            "layers": config.decoder_layers,
            "width": config.decoder_embed_dim,
            "ffn_width": config.decoder_ffn_dim,
            "heads": config.decoder_heads,
            "base": SITE_DECODER,
        }
        self.decoder: Stack | WindowDecoder
        if config.decoder == "window":
            self.decoder = WindowDecoder(
                WindowDecoderConfig(
                    **size, window_rows=window_rows(grid), position_dropout=config.position_dropout, eps=EPS
                )
            )
        else:
            self.decoder = Stack(StackConfig(**size, **shared))
        self.reconstruction_head = nn.Linear(config.decoder_embed_dim, grid.patch_values)
        for layer in (self.bridge, self.reconstruction_head):
            linear_init(nn.init.xavier_uniform_)(layer)
        self.encoder_positions = GridPositions(config.positions, config.embed_dim)
        self.decoder_positions = GridPositions(config.decoder_positions, config.decoder_embed_dim)

    def forward(
        self,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
        key: StepKey | None,
    ) -> Prediction:
        """See Pretrainer. encoder_out: (V + B, embed_dim), for each clip the class token and then its visible
        tokens, ascending; (V, embed_dim) without a class token."""
        self._check(plans)
        (plan,) = plans
        key = key if self.training else None
        encoder_out = self.encode(spectrogram, plan, mean, scale, key)
        x = self.decode(encoder_out, plan, key, plan.masked)
        return Prediction(encoder_out, self.reconstruction_head(x), None)

    def encode(
        self, spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, key: StepKey | None
    ) -> Tensor:
        """Return (V + B, embed_dim): see forward."""
        x, rows, _ = self.encoder_input(spectrogram, plan, mean, scale, key)
        return self.encoder(x, rows, key)

    def encoder_input(
        self, spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, key: StepKey | None
    ) -> EncoderInput:
        """See Pretrainer."""
        layout = plan.layout
        place = self._leading(layout)
        seen = place.rows(plan.visible, plan.cu_visible, plan.n_visible)
        x = self.patch_embed(self.read_patches(spectrogram, layout, plan.visible, mean, scale))
        x = x + self.encoder_positions.of(layout, plan.visible, self.patch_embed.weight.dtype)
        if self.cls_token is not None:
            slots = place.slots(place.clip.index_select(0, plan.visible.long()))
            x = mask_scatter(x, self.cls_token[0], slots.int(), place.leading(plan.cu_visible).int())
        return EncoderInput(x, seen, place.extra)

    def decode(
        self, encoder_out: Tensor, plan: MaskPlan, key: StepKey | None, wanted: Tensor | None
    ) -> Tensor:
        """Return (K, decoder_embed_dim) of the wanted tokens (K,), ids that count through the batch; None: the
        class token of every clip and then all of its tokens (the window decoder has no class token)."""
        layout = plan.layout
        place = self._leading(layout)
        if isinstance(self.decoder, WindowDecoder):
            return self._decode_windows(self.decoder, encoder_out, plan, key, wanted)
        rows = place.rows(None, layout.cu_tokens, layout.lengths)
        visible = place.all_slots(plan.visible)
        if self.cls_token is not None:
            seen = place.slots(place.clip.index_select(0, plan.visible.long()))
            both = visible.new_empty(len(encoder_out)).index_copy(0, seen, visible)
            visible = both.index_copy(0, place.leading(plan.cu_visible), place.leading(layout.cu_tokens))
        x = mask_scatter(
            self.bridge(encoder_out), self.mask_token[0], visible.int(), place.all_slots(plan.masked).int()
        )
        # the class token has no position
        positions = self.decoder_positions.of(layout, None, self.mask_token.dtype).to(x.dtype)
        x = x.index_add(0, place.slots(place.clip), positions)
        return self.decoder(x, rows, key, None if wanted is None else place.all_slots(wanted))

    def _decode_windows(
        self,
        decoder: WindowDecoder,
        encoder_out: Tensor,
        plan: MaskPlan,
        key: StepKey | None,
        wanted: Tensor | None,
    ) -> Tensor:
        layout = plan.layout
        visible, masked = plan.visible.long(), plan.masked.long()
        if self.cls_token is not None:
            place = self._leading(layout)
            encoder_out = encoder_out.index_select(0, place.slots(place.clip.index_select(0, visible)))
        windows = Windows(layout)
        rows = windows.rows()
        x = mask_scatter(
            self.bridge(encoder_out),
            self.mask_token[0],
            rows.index_select(0, visible).int(),
            rows.index_select(0, masked).int(),
        )
        tokens = torch.empty_like(rows).index_copy(0, rows, torch.arange(len(rows), device=rows.device))
        x = x + self.decoder_positions.of(layout, tokens, self.mask_token.dtype).to(x.dtype)
        return decoder(x, windows, key, rows if wanted is None else rows.index_select(0, wanted.long()))

    def _leading(self, layout: TokenLayout) -> Leading:
        return Leading(layout, 0 if self.cls_token is None else 1)

    def train_flops(self, plans: Sequence[MaskPlan], key: StepKey | None = None) -> int:
        """See Pretrainer: three times forward, but the patch embedding and the first layer of position biases have no
        gradient of their input."""
        (plan,) = plans
        config, values = self.config, self.grid.patch_values
        extra = int(config.cls_token)
        seen = [n + extra for n in plan.n_visible]
        rows = [n + extra for n in plan.layout.lengths]
        visible, masked = sum(plan.n_visible), sum(plan.n_masked)
        embed = 2 * visible * values * config.embed_dim
        forward = embed + stack_flops(seen, config.embed_dim, config.ffn_dim, config.encoder_layers)
        bridged, inputs = sum(seen), embed
        if isinstance(self.decoder, WindowDecoder):
            bridged = visible
            decoder, positions = window_flops(plan.layout.columns, self.grid, self.decoder.config, masked)
            inputs += positions
        else:
            decoder = stack_flops(
                rows, config.decoder_embed_dim, config.decoder_ffn_dim, config.decoder_layers, masked
            )
        forward += decoder + 2 * bridged * config.embed_dim * config.decoder_embed_dim
        forward += 2 * masked * config.decoder_embed_dim * values
        return 3 * forward - inputs

    def activation_bytes(self, tokens: int, clips: int, mask_ratio: float) -> int:
        """See Pretrainer."""
        config, values = self.config, self.grid.patch_values
        extra = int(config.cls_token)
        visible = clips * max(1, int(tokens * (1 - mask_ratio)))
        masked = clips * tokens - visible
        windows = config.decoder == "window"
        seen, rows = visible + clips * extra, clips * (tokens + (0 if windows else extra))
        encoder = block_values(config.embed_dim, config.ffn_dim, config.heads)
        # attention in windows keeps no log-sum-exp
        heads = 0 if windows else config.decoder_heads
        decoder = block_values(config.decoder_embed_dim, config.decoder_ffn_dim, heads)
        total = visible * values + seen * config.embed_dim
        total += config.encoder_layers * seen * encoder + config.decoder_layers * rows * decoder
        total += masked * (config.decoder_embed_dim + values)
        if isinstance(self.decoder, WindowDecoder):
            total += config.decoder_layers * position_values(self.decoder.config)
        hidden = 4 * config.decoder_embed_dim + 2 * config.decoder_ffn_dim
        return 4 * (total - (rows - masked) * hidden)
