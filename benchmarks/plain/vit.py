# SPDX-License-Identifier: Apache-2.0
"""The pre-norm transformer block of the ViT family."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention that keeps its weights as a (B, heads, N, N) tensor."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        batch, rows, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, rows, width))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, flattened row by row."""

    def __init__(self, patch: tuple[int, int], width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, width, patch, patch)

    def forward(self, image: Tensor) -> Tensor:
        """image: (B, 1, rows, columns). Returns (B, N, width)."""
        return self.proj(image).flatten(2).transpose(1, 2)


def patches_of(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return the patches (B, N, P) of (B, 1, H, W), each flattened row by row."""
    batch, _, height, width = image.shape
    a, b = patch
    cut = image.reshape(batch, height // a, a, width // b, b).permute(0, 1, 3, 2, 4)
    return cut.reshape(batch, -1, a * b)
