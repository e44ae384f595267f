# SPDX-License-Identifier: Apache-2.0
"""mask_scatter in Triton: one pass writes every row, no concatenation and no expanded mask token.

Backward reads the rows of the visible tokens, and adds up those of the masked ones in two stages with fixed bounds,
so the sum is the same every time. Not yet measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._triton import block_of, cdiv, jit, on, tl

# Values of a tile, and how many of them lie in one row at most.
TILE, MOST_VALUES = 2048, 1024
# The mask token's gradient: rows that are added up by one program at least, and programs at most.
LEAST_ROWS, MOST_PARTS = 32, 256
# Rows that such a program reads at a time.
STRIDE = 8

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define("mask_scatter_triton(Tensor x, Tensor mask_token, Tensor visible, Tensor masked) -> Tensor")
_library.define("take_rows_triton(Tensor rows, Tensor index) -> Tensor")
_library.define("sum_rows_triton(Tensor rows, Tensor index) -> Tensor")


def why_not(x_visible: Tensor, mask_token: Tensor) -> str | None:
    """Return None if Triton serves tensors like these, else why not."""
    return _triton.why_not(x_visible, x_visible.dtype, mask_token.dtype)


@jit(do_not_specialize=["n_visible", "n_rows"])
def mask_scatter_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    token_ptr: tl.tensor,
    visible_ptr: tl.tensor,
    masked_ptr: tl.tensor,
    n_visible: tl.tensor,
    n_rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """out: (n_rows, width). Program (i, j): ROWS rows from i * ROWS on, first the visible ones, then the masked."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    is_visible = row < n_visible
    is_masked = (row >= n_visible) & (row < n_rows)
    target = tl.load(visible_ptr + row, mask=is_visible, other=0)
    target += tl.load(masked_ptr + (row - n_visible), mask=is_masked, other=0)
    fits = (column < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * width + column[None, :], mask=is_visible[:, None] & fits, other=0.0)
    token = tl.load(token_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    value = tl.where(is_visible[:, None], x.to(tl.float32), token[None, :])
    tl.store(
        out_ptr + target.to(tl.int64)[:, None] * width + column[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=(row < n_rows)[:, None] & fits,
    )


@jit(do_not_specialize=["n_index"])
def take_rows_kernel(
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    index_ptr: tl.tensor,
    n_index: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """out: (n_index, width), row i is row index[i] of `rows`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    source = tl.load(index_ptr + row, mask=row < n_index, other=0).to(tl.int64)
    inside = (row < n_index)[:, None] & (column < width)[None, :]
    value = tl.load(rows_ptr + source[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + row[:, None] * width + column[None, :], value, mask=inside)


@jit(do_not_specialize=["n_index", "per_part"])
def sum_rows_kernel(
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    index_ptr: tl.tensor,
    n_index: tl.tensor,
    per_part: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
) -> None:
    """out: (parts, width) float32. Program (i, j): the sum of per_part rows of the index from i * per_part on."""
    first = tl.program_id(0).to(tl.int64) * per_part
    end = tl.minimum(first + per_part, n_index)
    column = tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    total = tl.zeros([ROWS, VALUES], tl.float32)
    for step in range(0, per_part, ROWS):
        row = first + step + tl.arange(0, ROWS)
        source = tl.load(index_ptr + row, mask=row < end, other=0).to(tl.int64)
        inside = (row < end)[:, None] & (column < width)[None, :]
        total += tl.load(rows_ptr + source[:, None] * width + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    out = out_ptr + tl.program_id(0).to(tl.int64) * width + column
    tl.store(out, tl.sum(total, 0), mask=column < width)


def mask_scatter(x_visible: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """See op.py."""
    return torch.ops.masktrain.mask_scatter_triton(x_visible, mask_token, visible, masked)


def _tile(n_rows: int, width: int) -> tuple[int, int]:
    values = block_of(width, most=MOST_VALUES)
    return block_of(n_rows, most=TILE // values), values


@torch.library.impl(_library, "mask_scatter_triton", "CompositeExplicitAutograd")
def _mask_scatter(x: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    x, mask_token, visible, masked = (t.contiguous() for t in (x, mask_token, visible, masked))
    (n_visible, width), n_rows = x.shape, x.shape[0] + masked.shape[0]
    out = x.new_empty((n_rows, width))
    if out.numel():
        rows, values = _tile(n_rows, width)
        with on(x):
            mask_scatter_kernel[(cdiv(n_rows, rows), cdiv(width, values))](
                out, x, mask_token, visible, masked, n_visible, n_rows, width, ROWS=rows, VALUES=values
            )
    return out


@torch.library.register_fake("masktrain::mask_scatter_triton", lib=_library)
def _mask_scatter_fake(x: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    return x.new_empty((x.shape[0] + masked.shape[0], x.shape[1]))


@torch.library.impl(_library, "take_rows_triton", "CompositeExplicitAutograd")
def _take_rows(rows: Tensor, index: Tensor) -> Tensor:
    rows, index = rows.contiguous(), index.contiguous()
    n_index, width = index.shape[0], rows.shape[1]
    out = rows.new_empty((n_index, width))
    if out.numel():
        tile_rows, values = _tile(n_index, width)
        with on(rows):
            take_rows_kernel[(cdiv(n_index, tile_rows), cdiv(width, values))](
                out, rows, index, n_index, width, ROWS=tile_rows, VALUES=values
            )
    return out


@torch.library.register_fake("masktrain::take_rows_triton", lib=_library)
def _take_rows_fake(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty((index.shape[0], rows.shape[1]))


@torch.library.impl(_library, "sum_rows_triton", "CompositeExplicitAutograd")
def _sum_rows(rows: Tensor, index: Tensor) -> Tensor:
    rows, index = rows.contiguous(), index.contiguous()
    n_index, width = index.shape[0], rows.shape[1]
    if n_index == 0 or width == 0:
        return rows.new_zeros(width, dtype=torch.float32)
    per_part = max(LEAST_ROWS, cdiv(n_index, MOST_PARTS))
    parts = rows.new_empty((cdiv(n_index, per_part), width), dtype=torch.float32)
    values = block_of(width, most=MOST_VALUES // STRIDE)
    with on(rows):
        sum_rows_kernel[(parts.shape[0], cdiv(width, values))](
            parts, rows, index, n_index, per_part, width, ROWS=STRIDE, VALUES=values
        )
    return parts.sum(0)


@torch.library.register_fake("masktrain::sum_rows_triton", lib=_library)
def _sum_rows_fake(rows: Tensor, index: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[1], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mask_token, visible, masked = inputs
    ctx.token_dtype = mask_token.dtype
    ctx.save_for_backward(visible, masked)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    visible, masked = ctx.saved_tensors
    grad_x = grad_token = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.masktrain.take_rows_triton(grad, visible)
    if ctx.needs_input_grad[1]:
        grad_token = torch.ops.masktrain.sum_rows_triton(grad, masked).to(ctx.token_dtype)
    return grad_x, grad_token, None, None


torch.library.register_autograd(
    "masktrain::mask_scatter_triton", _backward, setup_context=_save, lib=_library
)
