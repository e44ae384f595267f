# SPDX-License-Identifier: Apache-2.0
"""The definition of mask_scatter in plain PyTorch, differentiable by autograd."""

from __future__ import annotations

from torch import Tensor


def mask_scatter(x_visible: Tensor, mask_token: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
    """See op.py."""
    n_masked, width = masked.shape[0], x_visible.shape[1]
    out = x_visible.new_empty(visible.shape[0] + n_masked, width)
    out = out.index_copy(0, visible.long(), x_visible)
    return out.index_copy_(0, masked.long(), mask_token.to(x_visible.dtype).expand(n_masked, width))
