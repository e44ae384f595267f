# SPDX-License-Identifier: Apache-2.0
"""MAE-AST's step as described: all patches embedded, post-norm blocks with dropout, N x N logits a clip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain.vit import patches_of
from masktrain.models.mae_ast import MaeAstConfig
from masktrain.models.positions import sincos_table


class SelfAttention(nn.Module):
    """q, k and v from three layers; the weights are a (B, heads, N, N) tensor."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        batch, rows, width = x.shape
        q, k, v = (
            layer(x).view(batch, rows, self.heads, -1).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = (q * (width // self.heads) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return self.out_proj((weights @ v).transpose(1, 2).reshape(batch, rows, width))


class Layer(nn.Module):
    """LN(x + attention(x)), then LN(x + MLP(x))."""

    def __init__(self, width: int, hidden: int, heads: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = SelfAttention(width, heads, attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        x = self.self_attn_layer_norm(x + F.dropout(self.self_attn(x), self.dropout, self.training))
        hidden = self.fc2(F.gelu(self.fc1(x)))
        return self.final_layer_norm(x + F.dropout(hidden, self.dropout, self.training))


class Layers(nn.Module):
    """LayerNorm, dropout, layers."""

    def __init__(
        self, layers: int, width: int, hidden: int, heads: int, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.layer_norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(
            Layer(width, hidden, heads, dropout, attention_dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, width)."""
        x = F.dropout(self.layer_norm(x), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x)
        return x


class PlainMaeAst(nn.Module):
    """image: (B, 1, time, mel), raw log-mel. Layerdrop is left out: it takes time from neither side."""

    def __init__(self, config: MaeAstConfig, patch: tuple[int, int]) -> None:
        super().__init__()
        assert not config.has_bridge
        self.patch, self.dropout_input = patch, config.dropout_input
        width, values = config.embed_dim, patch[0] * patch[1]
        self.batch_norm = nn.BatchNorm2d(1, affine=False)
        self.post_extract_proj = nn.Linear(values, width)
        self.decoder_mask_emb = nn.Parameter(torch.zeros(width))
        rates = config.dropout, config.attention_dropout
        self.encoder = Layers(config.encoder_layers, width, config.ffn_dim, config.heads, *rates)
        self.decoder = Layers(
            config.decoder_layers, width, config.decoder_ffn_dim, config.decoder_heads, *rates
        )
        self.final_proj_reconstruction = nn.Linear(width, values)
        self.final_proj_classification = nn.Linear(width, values)
        self.register_buffer("positions", sincos_table(2048, width), persistent=False)

    def forward(self, image: Tensor, order: Tensor, kept: int) -> Tensor:
        """Return InfoNCE plus 10 times the squared error. order: (B, N), visible tokens first."""
        patches = patches_of(self.batch_norm(image) * 0.5, self.patch)
        x = F.dropout(self.post_extract_proj(patches), self.dropout_input, self.training)
        positions = self.positions[: x.shape[1]]
        x = x + positions
        x = self.encoder(_pick(x, order[:, :kept]))
        masked = order[:, kept:]
        filler = self.decoder_mask_emb.expand(len(x), masked.shape[1], -1)
        x = torch.cat([x, filler], dim=1)
        x = torch.gather(x, 1, order.argsort(1)[..., None].expand(-1, -1, x.shape[-1]))
        x = self.decoder(x + positions)
        x, target = _pick(x, masked), _pick(patches, masked)
        error = ((self.final_proj_reconstruction(x) - target) ** 2).mean()
        logits = self.final_proj_classification(x) @ target.transpose(1, 2)
        nce = -torch.diagonal(logits.log_softmax(-1), dim1=1, dim2=2).mean()
        return nce + 10 * error


def _pick(x: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))
