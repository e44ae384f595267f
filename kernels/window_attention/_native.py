# SPDX-License-Identifier: Apache-2.0
"""window_attention and its gradients by the native library: nothing is saved but the inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _native

LARGEST_WINDOW = 16
LARGEST_HEAD = 128
"""MT_LARGEST_WINDOW and MT_LARGEST_HEAD of csrc/include/masktrain_c.h."""

FORWARD = {torch.float32: "mt_window_attention_f32", torch.float64: "mt_window_attention_f64"}
BACKWARD = {torch.float32: "mt_window_attention_grad_f32", torch.float64: "mt_window_attention_grad_f64"}

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define("window_attention(Tensor qkv, Tensor tau, Tensor bias, Tensor cu) -> Tensor")
_library.define(
    "window_attention_grad(Tensor grad, Tensor qkv, Tensor tau, Tensor bias, Tensor cu) -> (Tensor, Tensor, Tensor)"
)


def why_not(qkv: Tensor, tau: Tensor, bias: Tensor) -> str | None:
    """Return None if the native library serves these arguments of the op, else why not."""
    if qkv.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {qkv.device}"
    if qkv.dtype not in FORWARD or qkv.dtype != tau.dtype:
        return f"the native library takes all in float32 or in float64, not {qkv.dtype} and {tau.dtype}"
    if bias.shape[1] > LARGEST_WINDOW:
        return f"the native library takes windows of at most {LARGEST_WINDOW} rows, not {bias.shape[1]}"
    if qkv.shape[3] > LARGEST_HEAD:
        return f"the native library takes heads of at most {LARGEST_HEAD} values, not {qkv.shape[3]}"
    return _native.why_not()


def window_attention(qkv: Tensor, tau: Tensor, bias: Tensor, cu: Tensor) -> Tensor:
    """See op.py."""
    return torch.ops.masktrain.window_attention(qkv, tau, bias, cu)


@torch.library.impl(_library, "window_attention", "CPU")
def _forward(qkv: Tensor, tau: Tensor, bias: Tensor, cu: Tensor) -> Tensor:
    qkv, tau, bias, cu = (t.contiguous() for t in (qkv, tau, bias, cu))
    rows, _, heads, width = qkv.shape
    out = qkv.new_empty(rows, heads, width)
    getattr(_native.require(), FORWARD[qkv.dtype])(
        out.data_ptr(),
        qkv.data_ptr(),
        tau.data_ptr(),
        bias.data_ptr(),
        cu.data_ptr(),
        len(cu) - 1,
        rows,
        heads,
        width,
        bias.shape[1],
        _native.threads(),
    )
    return out


@torch.library.register_fake("masktrain::window_attention", lib=_library)
def _forward_fake(qkv: Tensor, tau: Tensor, bias: Tensor, cu: Tensor) -> Tensor:
    return qkv.new_empty(qkv.shape[0], *qkv.shape[2:])


@torch.library.impl(_library, "window_attention_grad", "CPU")
def _backward(
    grad: Tensor, qkv: Tensor, tau: Tensor, bias: Tensor, cu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, qkv, tau, bias, cu = (t.contiguous() for t in (grad, qkv, tau, bias, cu))
    rows, _, heads, width = qkv.shape
    out = torch.empty_like(qkv), torch.empty_like(tau), torch.empty_like(bias)
    threads = _native.threads()
    partial = torch.empty(threads * heads * (LARGEST_WINDOW**2 + 1), dtype=torch.float64)
    getattr(_native.require(), BACKWARD[qkv.dtype])(
        *(t.data_ptr() for t in out),
        partial.data_ptr(),
        grad.data_ptr(),
        qkv.data_ptr(),
        tau.data_ptr(),
        bias.data_ptr(),
        cu.data_ptr(),
        len(cu) - 1,
        rows,
        heads,
        width,
        bias.shape[1],
        threads,
    )
    return out


@torch.library.register_fake("masktrain::window_attention_grad", lib=_library)
def _backward_fake(
    grad: Tensor, qkv: Tensor, tau: Tensor, bias: Tensor, cu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), tau.new_empty(tau.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.masktrain.window_attention_grad(grad, *ctx.saved_tensors), None)


torch.library.register_autograd("masktrain::window_attention", _gradients, setup_context=_save, lib=_library)
