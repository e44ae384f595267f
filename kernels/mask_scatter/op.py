# SPDX-License-Identifier: Apache-2.0
"""The public face of mask_scatter: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import FLOATS, check_devices, check_tensor
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked
from masktrain.kernels.mask_scatter import _native, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.mask_scatter, _triton.why_not, not_unasked),
    Implementation("native", _native.mask_scatter, _native.why_not, _native.not_unasked),
    Implementation("reference", reference.mask_scatter, lambda *_: None),
)


def mask_scatter(
    x_visible: Tensor,
    mask_token: Tensor,
    visible: Tensor,
    masked: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    """Return (V + M, D): row visible[v] is x_visible[v], every row of `masked` is mask_token.

    x_visible: (V, D) float. mask_token: (D,) float, cast to the dtype of x_visible. visible: (V,) int32,
    masked: (M,) int32, disjoint and together 0 ... V + M - 1, as in a MaskPlan; other ids are undefined.
    Differentiable in x_visible and mask_token. Raises TypeError or ValueError for a wrong dtype, shape or
    device.
    """
    op = "mask_scatter"
    check_tensor(op, "x_visible", x_visible, FLOATS, ("V", "D"))
    check_tensor(op, "mask_token", mask_token, FLOATS, (x_visible.shape[1],))
    check_tensor(op, "visible", visible, (torch.int32,), (x_visible.shape[0],))
    check_tensor(op, "masked", masked, (torch.int32,), ("M",))
    check_devices(op, x_visible=x_visible, mask_token=mask_token, visible=visible, masked=masked)
    choice = choose(op, IMPLEMENTATIONS, x_visible, mask_token, request=implementation)
    return choice.function(x_visible, mask_token, visible, masked)
