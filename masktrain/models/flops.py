# SPDX-License-Identifier: Apache-2.0
"""What a stack of blocks costs: floating-point operations of its matrix products, and values kept for backward.

A multiply-add counts as two operations. Norms, activations, dropout and the losses are left out, as is what
an implementation computes twice: these are the operations that the method needs.
"""

from __future__ import annotations

from collections.abc import Sequence


def block_flops(lengths: Sequence[int], width: int, ffn_width: int, kept: int | None = None) -> int:
    """Return the forward operations of one block over clips of the given lengths, of which `kept` rows in all are
    wanted behind the attention; None: all."""
    rows = sum(lengths)
    behind = rows if kept is None else kept
    linear = 2 * rows * 3 * width * width + 2 * behind * (width * width + 2 * width * ffn_width)
    attention = 4 * width * sum(n * n for n in lengths)
    return linear + attention


def stack_flops(
    lengths: Sequence[int], width: int, ffn_width: int, layers: int, kept: int | None = None
) -> int:
    """Return the forward operations of a stack whose last block returns `kept` rows; None: all."""
    if layers == 0:
        return 0
    full = block_flops(lengths, width, ffn_width)
    return (layers - 1) * full + block_flops(lengths, width, ffn_width, kept)


def block_values(width: int, ffn_width: int, heads: int) -> int:
    """Return the values a block keeps per row: its input, q, k, v, the attention output and its log-sum-exp, the
    inputs of both norms, the output of the first with the norms' statistics, and the hidden values before and
    after GELU."""
    return 8 * width + 2 * ffn_width + heads + 4
