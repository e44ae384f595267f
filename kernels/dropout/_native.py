# SPDX-License-Identifier: Apache-2.0
"""dropout and attention_keep_padded by the native library, as torch ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels.dropout.reference import keep_scale

DROPOUT = {torch.float32: "mt_dropout_f32", torch.float64: "mt_dropout_f64"}
ATTENTION_KEEP = {torch.float32: "mt_attention_keep_f32", torch.float64: "mt_attention_keep_f64"}

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "dropout(Tensor x, SymInt threshold, Tensor counter, Tensor row_ids, Tensor row_pos, SymInt site) "
    "-> Tensor"
)
_library.define(
    "attention_keep_padded(SymInt[] lengths, SymInt heads, SymInt threshold, Tensor counter, Tensor clip_ids, "
    "SymInt site, ScalarType dtype) -> Tensor"
)


def why_not(x: Tensor, dtype: torch.dtype) -> str | None:
    """Return None if the native library serves `dtype` on the device of x, else why not."""
    if x.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {x.device}"
    if dtype not in DROPOUT:
        return f"the native library computes in float32 and float64, not in {dtype}"
    return _native.why_not()


def dropout(
    x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, *, site: int
) -> Tensor:
    """See `op.dropout`."""
    return torch.ops.masktrain.dropout(x, threshold, counter, row_ids, row_pos, site)


@torch.library.impl(_library, "dropout", "CPU")
def _dropout(
    x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, site: int
) -> Tensor:
    x, counter, row_ids, row_pos = (t.contiguous() for t in (x, counter, row_ids, row_pos))
    out = torch.empty_like(x)
    getattr(_native.require(), DROPOUT[x.dtype])(
        out.data_ptr(),
        x.data_ptr(),
        counter.data_ptr(),
        row_ids.data_ptr(),
        row_pos.data_ptr(),
        x.shape[0],
        x.shape[1],
        site,
        threshold,
        keep_scale(threshold),
        _native.threads(),
    )
    return out


@torch.library.register_fake("masktrain::dropout", lib=_library)
def _dropout_fake(
    x: Tensor, threshold: int, counter: Tensor, row_ids: Tensor, row_pos: Tensor, site: int
) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.threshold, *keys, ctx.site = inputs
    ctx.save_for_backward(*keys)


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The op is linear in x, so its backward is the op itself, with the bits made again."""
    grad_x = torch.ops.masktrain.dropout(grad, ctx.threshold, *ctx.saved_tensors, ctx.site)
    return grad_x, None, None, None, None, None


torch.library.register_autograd("masktrain::dropout", _dropout_backward, setup_context=_save, lib=_library)


def attention_keep_padded(
    lengths: tuple[int, ...],
    heads: int,
    threshold: int,
    counter: Tensor,
    clip_ids: Tensor,
    *,
    site: int,
    dtype: torch.dtype,
) -> Tensor:
    """See `op.attention_keep_padded`."""
    return torch.ops.masktrain.attention_keep_padded(
        lengths, heads, threshold, counter, clip_ids, site, dtype
    )


@torch.library.impl(_library, "attention_keep_padded", "CPU")
def _attention_keep_padded(
    lengths: Sequence[int],
    heads: int,
    threshold: int,
    counter: Tensor,
    clip_ids: Tensor,
    site: int,
    dtype: torch.dtype,
) -> Tensor:
    counter, clip_ids = counter.contiguous(), clip_ids.contiguous()
    function = getattr(_native.require(), ATTENTION_KEEP[dtype])
    n_max = max(lengths, default=0)
    # Cells outside a clip are 0 and nothing else writes them.
    make = torch.zeros if len(set(lengths)) > 1 else torch.empty
    out = make(len(lengths), heads, n_max, n_max, dtype=dtype)
    for b, n in enumerate(lengths):
        function(
            out[b].data_ptr(),
            counter.data_ptr(),
            clip_ids.data_ptr() + b * clip_ids.element_size(),
            heads,
            n,
            n_max,
            n_max * n_max,
            site,
            threshold,
            keep_scale(threshold),
            _native.threads(),
        )
    return out


@torch.library.register_fake("masktrain::attention_keep_padded", lib=_library)
def _attention_keep_padded_fake(
    lengths: Sequence[int],
    heads: int,
    threshold: int,
    counter: Tensor,
    clip_ids: Tensor,
    site: int,
    dtype: torch.dtype,
) -> Tensor:
    n_max = max(lengths, default=0)
    return clip_ids.new_empty(len(lengths), heads, n_max, n_max, dtype=dtype)
