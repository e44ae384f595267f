# SPDX-License-Identifier: Apache-2.0
"""The masked autoencoder as facebookresearch/mae describes it, on spectrograms: MaskSpec, MSM-MAE, AudioMAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.plain.vit import Block, PatchEmbed, patches_of
from benchmarks.plain.window import WindowBlock
from masktrain.models.mae import MaeConfig
from masktrain.models.positions import sincos_halves


class PlainMae(nn.Module):
    """image: (B, 1, H, W) with the outer axis of the token order as H."""

    def __init__(
        self, config: MaeConfig, shape: tuple[int, int], patch: tuple[int, int], norm_pix_loss: bool
    ) -> None:
        """shape: of the image. patch: its height and width."""
        super().__init__()
        self.patch, self.norm_pix_loss = patch, norm_pix_loss
        grid = shape[0] // patch[0], shape[1] // patch[1]
        self.patch_embed = PatchEmbed(patch, config.embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_embed_dim))
        self.register_buffer("positions", _table(grid, config.embed_dim), persistent=False)
        self.register_buffer("decoder_positions", _table(grid, config.decoder_embed_dim), persistent=False)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.ffn_dim, config.heads) for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(config.embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(config.embed_dim, config.decoder_embed_dim)
        width, hidden, heads = config.decoder_embed_dim, config.decoder_ffn_dim, config.decoder_heads
        self.windows = config.decoder == "window"
        self.decoder_blocks = nn.ModuleList(
            WindowBlock(width, hidden, heads, grid, layer % 2 == 1, config.position_dropout)
            if self.windows
            else Block(width, hidden, heads)
            for layer in range(config.decoder_layers)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, patch[0] * patch[1])

    def forward(self, image: Tensor, noise: Tensor, kept: int) -> Tensor:
        """Return the loss. noise: (B, N); the `kept` tokens with the smallest stay visible."""
        x = self.patch_embed(image) + self.positions[1:]
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        x = torch.gather(x, 1, order[:, :kept, None].expand(-1, -1, x.shape[-1]))
        mask = torch.ones_like(noise)
        mask[:, :kept] = 0
        mask = torch.gather(mask, 1, back)
        x = torch.cat([(self.cls_token + self.positions[:1]).expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        filler = self.mask_token.expand(len(x), noise.shape[1] - kept, -1)
        tokens = torch.cat([x[:, 1:], filler], dim=1)
        tokens = torch.gather(tokens, 1, back[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_positions
        if self.windows:
            x = x[:, 1:]
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))
        pred = pred if self.windows else pred[:, 1:]
        target = patches_of(image, self.patch)
        if self.norm_pix_loss:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()


def _table(grid: tuple[int, int], width: int) -> Tensor:
    """Return (1 + N, width): zeros, then for each token its column's half and its row's half."""
    rows, columns = sincos_halves(grid[0], width // 2), sincos_halves(grid[1], width // 2)
    table = torch.cat(
        [columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], 0)],
        dim=1,
    )
    return torch.cat([torch.zeros(1, width), table])
