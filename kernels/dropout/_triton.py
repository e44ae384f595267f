# SPDX-License-Identifier: Apache-2.0
"""dropout in Triton: each program makes the Philox blocks of its tile once, eight decisions from each.

Not yet measured on a GPU. Bits: those of the reference. Values: float32 arithmetic, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels._triton import block_of, cdiv, halves_of, jit, load_key, on, philox_4x32, tl
from masktrain.kernels.dropout.reference import keep_scale
from masktrain.kernels.philox.reference import Purpose

# Philox blocks of a tile, and how many of them lie in one row at most: 256 values.
TILE, MOST_BLOCKS = 256, 32

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "dropout_triton(Tensor x, SymInt threshold, Tensor counter, Tensor row_ids, Tensor row_pos, SymInt site) "
    "-> Tensor"
)


@jit(do_not_specialize=["n_rows", "threshold", "site"])
def dropout_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    row_ids_ptr: tl.tensor,
    row_pos_ptr: tl.tensor,
    n_rows: tl.tensor,
    width: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    site: tl.tensor,
    PURPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """out, x: (n_rows, width). Program (i, j): ROWS rows from i * ROWS on, BLOCKS blocks of each from j * BLOCKS on."""
    k0, k1, step = load_key(counter_ptr, PURPOSE)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    clip = tl.load(row_ids_ptr + row, mask=exists, other=0)
    position = tl.load(row_pos_ptr + row, mask=exists, other=0)
    first = tl.program_id(1) * BLOCKS
    block = position[:, None] * ((width + 7) // 8) + (first + tl.arange(0, BLOCKS))[None, :]
    w0, w1, w2, w3 = philox_4x32(
        block.to(tl.uint32), site.to(tl.uint32), clip.to(tl.uint32)[:, None], step, k0, k1
    )
    keep = halves_of(w0, w1, w2, w3) >= threshold.to(tl.uint32)
    column = (first * 8 + tl.arange(0, 8 * BLOCKS))[None, :]
    inside = exists[:, None] & (column < width)
    offset = row[:, None] * width + column
    x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offset, tl.where(keep, x * scale, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


def dropout(
    x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, *, site: int
) -> Tensor:
    """See `op.dropout`."""
    return torch.ops.masktrain.dropout_triton(x, threshold, counter, row_ids, row_pos, site)


@torch.library.impl(_library, "dropout_triton", "CompositeExplicitAutograd")
def _dropout(
    x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, site: int
) -> Tensor:
    x, counter, row_ids, row_pos = (t.contiguous() for t in (x, counter, row_ids, row_pos))
    out = torch.empty_like(x)
    if x.numel():
        n_rows, width = x.shape
        blocks = block_of(cdiv(width, 8), most=MOST_BLOCKS)
        rows = block_of(n_rows, most=TILE // blocks)
        with on(x):
            dropout_kernel[(cdiv(n_rows, rows), cdiv(width, 8 * blocks))](
                out,
                x,
                counter,
                row_ids,
                row_pos,
                n_rows,
                width,
                threshold,
                keep_scale(threshold),
                site,
                PURPOSE=int(Purpose.DROPOUT),
                ROWS=rows,
                BLOCKS=blocks,
            )
    return out


@torch.library.register_fake("masktrain::dropout_triton", lib=_library)
def _dropout_fake(
    x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, site: int
) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.threshold, *keys, ctx.site = inputs
    ctx.save_for_backward(*keys)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The op is linear in x, so its backward is the op itself, with the bits made again."""
    grad_x = torch.ops.masktrain.dropout_triton(grad, ctx.threshold, *ctx.saved_tensors, ctx.site)
    return grad_x, None, None, None, None, None


torch.library.register_autograd(
    "masktrain::dropout_triton", _dropout_backward, setup_context=_save, lib=_library
)
