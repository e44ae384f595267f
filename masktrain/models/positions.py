# SPDX-License-Identifier: Apache-2.0
"""Fixed positions of tokens, and where a token lies in its clip's grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from masktrain.types import TokenLayout

FIRST_ROWS = 512


def sincos_table(length: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the (length, width) float32 table of fixed positions.

    Row t holds sin(t w_i) in column 2 i and cos(t w_i) in column 2 i + 1, w_i = 10000^(-2 i / width)
    ("Attention is all you need", section 3.5). dtype: of the arithmetic. MAE-AST has float32 throughout
    (AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py): the rounding of t w_i moves values by up to 3e-5 at
    t = 500, and published weights have seen exactly that table. MSM-MAE has float64 (nttcslab/msm-mae).
    """
    angles = _angles(length, width, dtype)
    table = torch.empty(length, width)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.cos()
    return table


def sincos_halves(length: int, width: int) -> Tensor:
    """Return the (length, width) float32 table whose row t holds all sin(t w_i), then all cos(t w_i), w_i as in
    `sincos_table`, computed in float64 (facebookresearch/mae:util/pos_embed.py)."""
    angles = _angles(length, width, torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def _angles(length: int, width: int, dtype: torch.dtype) -> Tensor:
    rates = torch.exp(torch.arange(0, width, 2, dtype=dtype) * (-math.log(10000.0) / width))
    return torch.arange(length, dtype=dtype)[:, None] * rates


class Positions(nn.Module):
    """Rows of a fixed table at any number. The table moves with the model, is no weight, and grows with the largest
    number asked for."""

    rows: Tensor

    def __init__(self, table: Callable[[int, int], Tensor], width: int) -> None:
        """table: of (length, width)."""
        super().__init__()
        self.table = table
        self.width = width
        # there before the first forward pass: a compiled one would be traced again for a table made inside it
        self.register_buffer("rows", table(FIRST_ROWS, width), persistent=False)

    def at(self, numbers: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        """Return (N, width) for numbers (N,) int64, all below `longest`, which the host knows."""
        if longest > self.rows.shape[0]:
            length = 1 << (longest - 1).bit_length()
            # computed on the CPU: the same on every device
            self.rows = self.table(length, self.width).to(self.rows)
        return self.rows.index_select(0, numbers).to(dtype)


def clip_of(layout: TokenLayout) -> Tensor:
    """Return (N,) int64: which clip of the batch each token belongs to."""
    counts = (layout.cu_tokens[1:] - layout.cu_tokens[:-1]).long()
    return torch.repeat_interleave(counts, output_size=sum(layout.lengths))


def grid_coordinates(
    layout: TokenLayout, tokens: Tensor | None = None, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (K,) int64 each: the outer and the inner number of tokens, in the token order of the grid.

    tokens: (K,) ids that count through the batch; None: all. Token t of a clip has outer number t // n and inner
    number t % n, n being the extent of the inner axis: the grid's rows in order "time", the clip's columns in order
    "freq". transposed: n is the extent of the outer axis, as where a published code swaps height and width
    (facebookresearch/AudioMAE:util/patch_embed.py).
    """
    clip, token = within_clip(layout, tokens)
    if (layout.grid.order == "time") != transposed:
        return token // layout.grid.freq, token % layout.grid.freq
    first = layout.cu_tokens.long()
    columns = ((first[1:] - first[:-1]) // layout.grid.freq).index_select(0, clip)
    # no token is in a clip without columns; compiled vector code divides in its unused lanes too, which hold 0
    columns = columns.clamp(min=1)
    return token // columns, token % columns


def within_clip(layout: TokenLayout, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (K,) int64 each: the clip of tokens, ids that count through the batch (None: all), and their number
    within it."""
    clip = clip_of(layout)
    if tokens is None:
        tokens = torch.arange(len(clip), device=clip.device)
    else:
        tokens = tokens.long()
        clip = clip.index_select(0, tokens)
    return clip, tokens - layout.cu_tokens.long().index_select(0, clip)
