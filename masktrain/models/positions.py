# SPDX-License-Identifier: Apache-2.0
"""Fixed positions of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sincos_table(length: int, width: int) -> Tensor:
    """Return the (length, width) float32 table of fixed positions.

    Row t holds sin(t w_i) in column 2 i and cos(t w_i) in column 2 i + 1, w_i = 10000^(-2 i / width)
    ("Attention is all you need", section 3.5). In float32 throughout, as the code of
    AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py: the rounding of t w_i moves values by up to 3e-5 at
    t = 500, and published weights have seen exactly that table.
    """
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    table = torch.empty(length, width)
    table[:, 0::2] = angles.sin()
    table[:, 1::2] = angles.cos()
    return table


class SinCosPositions:
    """Rows of the table at any token number; it grows with the longest clip and is kept for each device."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.tables: dict[torch.device, Tensor] = {}

    def at(self, positions: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        """Return (N, width) for token numbers (N,) int64, all below `longest`, which the host knows."""
        table = self.tables.get(positions.device)
        if table is None or table.shape[0] < longest:
            length = 1 << max(9, (longest - 1).bit_length())
            # computed on the CPU: the same on every device
            table = sincos_table(length, self.width).to(positions.device)
            self.tables[positions.device] = table
        return table.index_select(0, positions).to(dtype)
