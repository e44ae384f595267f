# SPDX-License-Identifier: Apache-2.0
"""The definition of window_attention in plain PyTorch, differentiable by autograd.

Windows stand side by side as a dense batch. Where some have fewer rows than the others, they are padded with rows
that no query sees; where all are full, nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_NORMS = 1e-6
LEAST_TAU = 0.01


def window_attention(qkv: Tensor, tau: Tensor, bias: Tensor, cu: Tensor) -> Tensor:
    """See op.py."""
    rows, windows, most = qkv.shape[0], len(cu) - 1, bias.shape[1]
    wide = torch.promote_types(qkv.dtype, torch.float32)
    exists = None
    if rows < windows * most:
        slots = cu[:-1, None] + torch.arange(most, dtype=cu.dtype, device=cu.device)
        exists = slots < cu[1:, None]
        qkv = qkv.index_select(0, slots.clamp(max=max(rows - 1, 0)).flatten())
    with torch.autocast(qkv.device.type, enabled=False):
        q, k, v = qkv.unflatten(0, (windows, most)).permute(2, 0, 3, 1, 4).unbind()
        norms = (
            torch.linalg.vector_norm(q, dim=-1, dtype=wide)[..., None]
            * (torch.linalg.vector_norm(k, dim=-1, dtype=wide)[..., None, :])
        )
        scores = (q @ k.mT).to(wide) / norms.clamp(min=LEAST_NORMS)
        scores = scores / tau.to(wide).clamp(min=LEAST_TAU)[:, None, None] + bias.to(wide)
        if exists is not None:
            scores = scores.masked_fill(~exists[:, None, None, :], -torch.inf)
        out = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(0, 1)
    if exists is None:
        return out
    row = torch.arange(rows, dtype=cu.dtype, device=cu.device)
    window = torch.searchsorted(cu, row, right=True) - 1
    return out.index_select(0, window * most + row - cu.index_select(0, window))
