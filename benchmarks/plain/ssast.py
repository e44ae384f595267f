# SPDX-License-Identifier: Apache-2.0
"""SSAST's joint step as described: two passes over all tokens under two masks, N x N logits a clip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.plain.vit import Block, PatchEmbed, patches_of


class Backbone(nn.Module):
    """A DeiT with class and distillation token and learned positions."""

    def __init__(
        self, tokens: int, patch: tuple[int, int], width: int, hidden: int, heads: int, layers: int
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens + 2, width))
        self.blocks = nn.ModuleList(Block(width, hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)


class PlainSsast(nn.Module):
    """image: (B, 1, mel, time)."""

    def __init__(
        self, tokens: int, patch: tuple[int, int], width: int, hidden: int, heads: int, layers: int
    ) -> None:
        super().__init__()
        self.patch = patch
        values = patch[0] * patch[1]
        self.v = Backbone(tokens, patch, width, hidden, heads, layers)
        self.mask_embed = nn.Parameter(torch.zeros(1, 1, width))
        self.cpredlayer = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, values))
        self.gpredlayer = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, values))

    def forward(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Return InfoNCE under the masked ids `first` (B, M) plus 10 times the squared error under `second`."""
        target = patches_of(image, self.patch)
        matched = self.cpredlayer(_pick(self._encode(image, first), first))
        logits = _pick(target, first) @ matched.transpose(1, 2)
        nce = -torch.diagonal(logits.log_softmax(-1), dim1=1, dim2=2).mean()
        reconstructed = self.gpredlayer(_pick(self._encode(image, second), second))
        return nce + 10 * ((reconstructed - _pick(target, second)) ** 2).mean()

    def _encode(self, image: Tensor, masked: Tensor) -> Tensor:
        v = self.v
        x = v.patch_embed(image)
        hidden = torch.zeros(x.shape[:2], device=x.device).scatter(1, masked, 1.0)[..., None]
        x = x * (1 - hidden) + self.mask_embed * hidden
        batch = len(x)
        x = torch.cat([v.cls_token.expand(batch, -1, -1), v.dist_token.expand(batch, -1, -1), x], dim=1)
        x = x + v.pos_embed
        for block in v.blocks:
            x = block(x)
        return v.norm(x)[:, 2:]


def _pick(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))
