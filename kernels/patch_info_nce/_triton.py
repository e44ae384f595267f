# SPDX-License-Identifier: Apache-2.0
"""patch_info_nce in Triton: the softmax of a clip's logits by tiles, forward and backward.

A program computes the rows of one tile of one clip and walks over the clip's other side in blocks: logits exist only
as one block at a time, in forward and again in backward. The softmax is computed online (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018). Saved for backward are pred, target and one log-sum-exp per token.
Each value has one writer, so results are the same in every run.

The side that owns the softmax is called x here, the other y: axis "targets" has x = pred, axis "predictions" has
x = target. With logits s_ij = x_i . y_j, term i is lse_i - s_ii and its slope by s_ij is exp(s_ij - lse_i) - [i = j].

All arithmetic is float32, products too: patches are raw values and logits unscaled, so a logit of 100 with the 10
bits of TF32 is off by 0.05 and its weight by 5 %. So no tensor cores are needed, and any GPU that Triton compiles
for serves. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._tiles import tile_table
from masktrain.kernels._triton import block_of, cdiv, jit, not_unasked, on, tl

__all__ = ["not_unasked", "patch_info_nce", "why_not"]

# Rows and columns of a block of logits, values of a product that are added at a time, values of a gradient per program:
# what compiles for sm_70 to sm_90 without spilling registers. Speed is not yet measured.
SIDE = 64
DEPTH = 32
GRADIENT = 128
WARPS = 8
STAGES = 1


def why_not(pred: Tensor, target: Tensor) -> str | None:
    """Return None if the Triton kernels serve, else why not."""
    return _triton.why_not(pred, pred.dtype, target.dtype)


@jit
def _load(
    ptr: tl.tensor, rows: tl.tensor, n: tl.tensor, stride: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr
) -> Any:
    """Return values (rows, columns) of a clip of n rows of WIDTH values as float32, 0 outside."""
    inside = (rows[:, None] < n) & (columns[None, :] < WIDTH)
    offsets = rows[:, None].to(tl.int64) * stride + columns[None, :]
    return tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@jit
def _logits(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    a_rows: tl.tensor,
    b_rows: tl.tensor,
    n: tl.tensor,
    a_stride: tl.tensor,
    b_stride: tl.tensor,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
) -> Any:
    """Return the products of the rows of a with those of b: (SIDE, SIDE) float32."""
    logits = tl.zeros([SIDE, SIDE], tl.float32)
    for first in range(0, WIDTH, DEPTH):
        d = first + tl.arange(0, DEPTH)
        a = _load(a_ptr, a_rows, n, a_stride, d, WIDTH)
        b = _load(b_ptr, b_rows, n, b_stride, d, WIDTH)
        logits = tl.dot(a, tl.trans(b), logits, input_precision="ieee")
    return logits


@jit
def forward_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    terms_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """terms, lse: (M,) float32. One program per tile of x."""
    entry = tiles_ptr + tl.program_id(0) * 4
    start, n, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    x_ptr += start * x_stride
    y_ptr += start * y_stride
    rows = first + tl.arange(0, SIDE)
    largest = tl.full([SIDE], float("-inf"), tl.float32)
    total = tl.zeros([SIDE], tl.float32)
    own = tl.zeros([SIDE], tl.float32)
    for first_column in range(0, n, SIDE):
        columns = first_column + tl.arange(0, SIDE)
        logits = _logits(x_ptr, y_ptr, rows, columns, n, x_stride, y_stride, WIDTH, SIDE, DEPTH)
        own += tl.sum(tl.where(rows[:, None] == columns[None, :], logits, 0.0), 1)
        logits = tl.where(columns[None, :] < n, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp(logits - new_largest[:, None])
        total = total * tl.exp(largest - new_largest) + tl.sum(weights, 1)
        largest = new_largest
    lse = largest + tl.log(total)
    tl.store(lse_ptr + start + rows, lse, mask=rows < n)
    tl.store(terms_ptr + start + rows, lse - own, mask=rows < n)


@jit
def gradient_kernel(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    x_stride: tl.tensor,
    y_stride: tl.tensor,
    grad_stride: tl.tensor,
    OF_X: tl.constexpr,
    WIDTH: tl.constexpr,
    SIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    GRADIENT: tl.constexpr,
) -> None:
    """out: (M, WIDTH), the gradient of x if OF_X, else of y. lse, grad: (M,), by tokens of x.

    Program (tile of x or y, i) computes the values from i * GRADIENT on. Blocks of logits have the shape and the
    order of sums that they have in forward, whichever side is walked: where one weight is nearly 1, the rounding
    of its logit must cancel against that in its log-sum-exp.
    """
    entry = tiles_ptr + tl.program_id(0) * 4
    start, n, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    x_ptr += start * x_stride
    y_ptr += start * y_stride
    lse_ptr += start
    grad_ptr += start * grad_stride
    own = first + tl.arange(0, SIDE)
    d = tl.program_id(1) * GRADIENT + tl.arange(0, GRADIENT)
    acc = tl.zeros([SIDE, GRADIENT], tl.float32)
    for first_other in range(0, n, SIDE):
        other = first_other + tl.arange(0, SIDE)
        xs, ys = (own, other) if OF_X else (other, own)
        logits = _logits(x_ptr, y_ptr, xs, ys, n, x_stride, y_stride, WIDTH, SIDE, DEPTH)
        lse = tl.load(lse_ptr + xs, mask=xs < n, other=float("inf"))
        grad = tl.load(grad_ptr + xs.to(tl.int64) * grad_stride, mask=xs < n, other=0.0)
        slope = tl.exp(logits - lse[:, None])
        slope = tl.where(ys[None, :] < n, slope, 0.0)
        slope = tl.where(xs[:, None] == ys[None, :], slope - 1.0, slope) * grad[:, None]
        if OF_X:
            acc = tl.dot(slope, _load(y_ptr, ys, n, y_stride, d, WIDTH), acc, input_precision="ieee")
        else:
            values = _load(x_ptr, xs, n, x_stride, d, WIDTH)
            acc = tl.dot(tl.trans(slope), values, acc, input_precision="ieee")
    # A token by itself has no negatives: exactly no slope, however a compiler orders the sums.
    acc *= tl.where(n > 1, 1.0, 0.0)
    out = out_ptr + (start + own[:, None]) * WIDTH + d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(own[:, None] < n) & (d[None, :] < WIDTH))


_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define("patch_info_nce_triton(Tensor x, Tensor y, SymInt[] counts) -> (Tensor terms, Tensor lse)")
_library.define(
    "patch_info_nce_triton_gradient(Tensor grad, Tensor x, Tensor y, Tensor lse, SymInt[] counts, bool of_x) -> Tensor"
)


def patch_info_nce(
    pred: Tensor, target: Tensor, cu_masked: Tensor, n_masked: tuple[int, ...], *, axis: str
) -> Tensor:
    """See op.py. cu_masked is not read: the table of tiles follows from n_masked."""
    x, y = (pred, target) if axis == "targets" else (target, pred)
    terms, _ = torch.ops.masktrain.patch_info_nce_triton(x, y, n_masked)
    # One number stands for all tokens: what it loses by rounding should be the last bit only.
    return terms.sum(dtype=torch.float64).float()


def _packed(x: Tensor) -> Tensor:
    """Return (M, P) with the values of a row side by side; rows may lie anywhere."""
    return x if x.stride(1) == 1 else x.contiguous()


@torch.library.impl(_library, "patch_info_nce_triton", "CompositeExplicitAutograd")
def _forward(x: Tensor, y: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    x, y = _packed(x), _packed(y)
    terms, lse = _outputs(x)
    tiles = tile_table(tuple(counts), SIDE, x.device)
    if len(tiles):
        with on(x):
            forward_kernel[(len(tiles),)](
                x,
                y,
                terms,
                lse,
                tiles,
                x.stride(0),
                y.stride(0),
                WIDTH=x.shape[1],
                SIDE=SIDE,
                DEPTH=DEPTH,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return terms, lse


@torch.library.impl(_library, "patch_info_nce_triton_gradient", "CompositeExplicitAutograd")
def _gradient(grad: Tensor, x: Tensor, y: Tensor, lse: Tensor, counts: Sequence[int], of_x: bool) -> Tensor:
    """Return the gradient of x or of y."""
    x, y = _packed(x), _packed(y)
    out = _gradient_fake(grad, x, y, lse, counts, of_x)
    width = x.shape[1]
    tiles = tile_table(tuple(counts), SIDE, x.device)
    if out.numel():
        block = block_of(width, least=16, most=GRADIENT)
        with on(x):
            gradient_kernel[(len(tiles), cdiv(width, block))](
                x,
                y,
                out,
                lse,
                grad,
                tiles,
                x.stride(0),
                y.stride(0),
                grad.stride(0),
                OF_X=of_x,
                WIDTH=width,
                SIDE=SIDE,
                DEPTH=DEPTH,
                GRADIENT=block,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return out


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    terms, lse = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return terms, lse


@torch.library.register_fake("masktrain::patch_info_nce_triton", lib=_library)
def _forward_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(x)


@torch.library.register_fake("masktrain::patch_info_nce_triton_gradient", lib=_library)
def _gradient_fake(
    grad: Tensor, x: Tensor, y: Tensor, lse: Tensor, counts: Sequence[int], of_x: bool
) -> Tensor:
    return (x if of_x else y).new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, ctx.counts = inputs
    ctx.save_for_backward(x, y, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, y, lse = ctx.saved_tensors
    gradient = torch.ops.masktrain.patch_info_nce_triton_gradient
    need_x, need_y, _ = ctx.needs_input_grad
    return (
        gradient(grad, x, y, lse, ctx.counts, True) if need_x else None,
        gradient(grad, x, y, lse, ctx.counts, False) if need_y else None,
        None,
    )


torch.library.register_autograd(
    "masktrain::patch_info_nce_triton", _differentiate, setup_context=_save, lib=_library
)
