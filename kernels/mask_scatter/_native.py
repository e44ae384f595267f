# SPDX-License-Identifier: Apache-2.0
"""mask_scatter by the native library: every row is written once, and read once backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _native

GRAD = {torch.float32: "mt_mask_scatter_grad_f32", torch.float64: "mt_mask_scatter_grad_f64"}
SUMMED_ROWS = 256
"""MT_SUMMED_ROWS of csrc/include/masktrain_c.h."""
SMALLEST = 1 << 15
"""Values of x_visible from which on the native library wins: measured by benchmarks/cpu_kernels.py."""

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define("mask_scatter(Tensor x, Tensor mask_token, Tensor visible, Tensor masked) -> Tensor")
_library.define("mask_scatter_grad(Tensor grad, Tensor visible, Tensor masked) -> (Tensor, Tensor)")


def why_not(x_visible: Tensor, mask_token: Tensor) -> str | None:
    """Return None if the native library serves tensors like these, else why not."""
    if x_visible.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {x_visible.device}"
    if x_visible.dtype not in GRAD:
        return f"the native library moves float32 or float64, not {x_visible.dtype}"
    return _native.why_not()


def not_unasked(x_visible: Tensor, mask_token: Tensor) -> str | None:
    """Return why the native library serves tensors like these only when asked for by name, or None."""
    if x_visible.numel() < SMALLEST:
        return f"fewer than {SMALLEST} visible values take the reference less time than a call"
    return None


def mask_scatter(x_visible: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """See op.py."""
    return torch.ops.masktrain.mask_scatter(x_visible, mask_token.to(x_visible.dtype), visible, masked)


@torch.library.impl(_library, "mask_scatter", "CPU")
def _mask_scatter(x: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    x, mask_token, visible, masked = (t.contiguous() for t in (x, mask_token, visible, masked))
    n_visible, n_masked, width = x.shape[0], masked.shape[0], x.shape[1]
    out = x.new_empty(n_visible + n_masked, width)
    places = (t.data_ptr() for t in (out, x, mask_token, visible))
    _native.require().mt_mask_scatter(
        *places, n_visible, masked.data_ptr(), n_masked, width * x.element_size(), _native.threads()
    )
    return out


@torch.library.register_fake("masktrain::mask_scatter", lib=_library)
def _mask_scatter_fake(x: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    return x.new_empty(x.shape[0] + masked.shape[0], x.shape[1])


@torch.library.impl(_library, "mask_scatter_grad", "CPU")
def _grad(grad: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    grad, visible, masked = grad.contiguous(), visible.contiguous(), masked.contiguous()
    n_visible, n_masked, width = visible.shape[0], masked.shape[0], grad.shape[1]
    grad_x = grad.new_empty(n_visible, width)
    sums = grad.new_empty(1 + -(-n_masked // SUMMED_ROWS), width, dtype=torch.float64)
    getattr(_native.require(), GRAD[grad.dtype])(
        grad_x.data_ptr(),
        sums[0].data_ptr(),
        grad.data_ptr(),
        visible.data_ptr(),
        n_visible,
        masked.data_ptr(),
        n_masked,
        width,
        sums[1:].data_ptr(),
        _native.threads(),
    )
    return grad_x, sums[0].to(grad.dtype, copy=True)


@torch.library.register_fake("masktrain::mask_scatter_grad", lib=_library)
def _grad_fake(grad: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(visible.shape[0], grad.shape[1]), grad.new_empty(grad.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[2:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.masktrain.mask_scatter_grad(grad, *ctx.saved_tensors), None, None


torch.library.register_autograd("masktrain::mask_scatter", _backward, setup_context=_save, lib=_library)
