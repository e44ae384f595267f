# SPDX-License-Identifier: Apache-2.0
"""The public face of window_attention: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import FLOATS, FULL_FLOATS, check_devices, check_tensor
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels.window_attention import _native, reference

IMPLEMENTATIONS = (
    Implementation("native", _native.window_attention, _native.why_not),
    Implementation("reference", reference.window_attention, lambda *_: None),
)


def window_attention(
    qkv: Tensor, tau: Tensor, bias: Tensor, cu: Tensor, *, implementation: str | None = None
) -> Tensor:
    """Return, for each row, the values of its window weighted by softmax(cos(q, k) / tau + bias).

    qkv: (N, 3, H, Dh) float, the queries, keys and values of packed rows. tau: (H,) float32 or float64, counted as
    at least 0.01. bias: (H, S, S) of tau's dtype: that of the i-th row of a window as query and its j-th as key. cu:
    (W+1,) int32, windows are consecutive rows: window w is cu[w] ... cu[w+1] - 1, at most S of them, cu[0] = 0 and
    cu[W] = N. cos(q, k) = q k / max(|q| |k|, 1e-6).

    Scores and softmax are in float32, or in float64 for float64. This is attention of Swin Transformer V2 (Liu et
    al., CVPR 2022, section 3.3) as facebookresearch/AudioMAE:timm_patch/swin_transformer.py has it; the windows that
    a shift leaves at the edges are smaller here, where that code masks keys by -100.

    Returns (N, H, Dh) in the dtype of qkv. Differentiable in qkv, tau and bias. No host sync. Raises TypeError or
    ValueError for a wrong dtype, shape or device; other cu are undefined.
    """
    op = "window_attention"
    check_tensor(op, "qkv", qkv, FLOATS, ("N", 3, "H", "Dh"))
    heads = qkv.shape[2]
    check_tensor(op, "tau", tau, FULL_FLOATS, (heads,))
    check_tensor(op, "bias", bias, (tau.dtype,), (heads, "S", "S"))
    if bias.shape[1] != bias.shape[2]:
        raise ValueError(f"{op}: bias must be square, received {tuple(bias.shape)}.")
    check_tensor(op, "cu", cu, (torch.int32,), ("W+1",))
    check_devices(op, qkv=qkv, tau=tau, bias=bias, cu=cu)
    choice = choose(op, IMPLEMENTATIONS, qkv, tau, bias, request=implementation)
    return choice.function(qkv, tau, bias, cu)
