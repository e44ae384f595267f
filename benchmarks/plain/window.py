# SPDX-License-Identifier: Apache-2.0
"""AudioMAE's decoder block as described: rolls, partitioned windows, a bias table computed in each call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain.vit import Mlp

WINDOW = 4
SHIFT = 2  # in time only


class BiasMlp(nn.Module):
    """Relative offsets (n, 2) to one bias a head, dropout after both layers."""

    def __init__(self, heads: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(2, 384)
        self.fc2 = nn.Linear(384, heads)

    def forward(self, offsets: Tensor) -> Tensor:
        """offsets: (n, 2). Returns (n, heads)."""
        hidden = F.dropout(F.relu(self.fc1(offsets)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class WindowAttention(nn.Module):
    """Cosine attention within windows with a continuous position bias."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.meta_mlp = BiasMlp(heads, dropout)
        self.tau = nn.Parameter(torch.ones(heads))
        axis = torch.arange(WINDOW)
        cells = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
        offsets = (cells[:, :, None] - cells[:, None, :]).permute(1, 2, 0).reshape(-1, 2).float()
        self.register_buffer("offsets", offsets.sign() * (1 + offsets.abs()).log(), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (windows, 16, width). mask: (windows a clip, 16, 16) or None."""
        windows, rows, width = x.shape
        q, k, v = self.qkv(x).reshape(windows, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        logits = logits / self.tau.clamp(min=0.01).reshape(1, -1, 1, 1)
        bias = self.meta_mlp(self.offsets).transpose(0, 1).reshape(self.heads, rows, rows)
        logits = logits + bias
        if mask is not None:
            clips = windows // len(mask)
            logits = logits.view(clips, len(mask), self.heads, rows, rows) + mask[None, :, None]
            logits = logits.view(windows, self.heads, rows, rows)
        x = (logits.softmax(-1) @ v).transpose(1, 2).reshape(windows, rows, width)
        return self.proj(x)


class WindowBlock(nn.Module):
    """x + LN(attention(x)), then x + LN(MLP(x)), in plain or shifted windows of a (time, frequency) grid."""

    def __init__(
        self, width: int, hidden: int, heads: int, grid: tuple[int, int], shifted: bool, dropout: float
    ) -> None:
        super().__init__()
        self.grid, self.shifted = grid, shifted
        self.attn = WindowAttention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        mask = None
        if shifted:
            region = torch.zeros(1, *grid, 1)
            region[:, -WINDOW:-SHIFT] = 1
            region[:, -SHIFT:] = 2
            cells = partition(region).squeeze(-1)
            mask = torch.where(cells[:, :, None] == cells[:, None, :], 0.0, -100.0)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        batch, tokens, width = x.shape
        image = x.view(batch, *self.grid, width)
        if self.shifted:
            image = torch.roll(image, -SHIFT, 1)
        image = joined(self.attn(partition(image), self.mask), batch, self.grid)
        if self.shifted:
            image = torch.roll(image, SHIFT, 1)
        x = x + self.norm1(image.reshape(batch, tokens, width))
        return x + self.norm2(self.mlp(x))


def partition(image: Tensor) -> Tensor:
    """Return the windows (B * windows, 16, D) of (B, H, W, D)."""
    batch, height, width, channels = image.shape
    cut = image.view(batch, height // WINDOW, WINDOW, width // WINDOW, WINDOW, channels)
    return cut.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW * WINDOW, channels)


def joined(windows: Tensor, batch: int, grid: tuple[int, int]) -> Tensor:
    """Return the (B, H, W, D) image of its windows."""
    cut = windows.view(batch, grid[0] // WINDOW, grid[1] // WINDOW, WINDOW, WINDOW, -1)
    return cut.permute(0, 1, 3, 2, 4, 5).contiguous().view(batch, *grid, -1)
