# SPDX-License-Identifier: Apache-2.0
"""Which implementation of each op serves on a device: every op of a training step is called once on tiny tensors."""

from __future__ import annotations

from typing import Any

import torch

from masktrain.kernels import _dispatch
from masktrain.kernels.dropout import dropout
from masktrain.kernels.mask_gather import mask_gather
from masktrain.kernels.mask_scatter import mask_scatter
from masktrain.kernels.masked_patch_loss import masked_patch_loss
from masktrain.kernels.ncut_scores import ncut_scores
from masktrain.kernels.patch_info_nce import patch_info_nce
from masktrain.kernels.patch_mad import patch_mad
from masktrain.kernels.philox import Purpose, philox_words
from masktrain.kernels.select_tokens import select_tokens
from masktrain.kernels.varlen_attention import varlen_attention
from masktrain.kernels.window_attention import window_attention


def kernel_choices(device: torch.device) -> tuple[_dispatch.Choice, ...]:
    """Return the choice of each op that has one, in order of the op's name."""
    before = _dispatch.chosen()
    _dispatch.record(())
    try:
        _call_each(device)
        return tuple(sorted(_dispatch.chosen(), key=lambda choice: choice.op))
    finally:
        _dispatch.record(before)


def _call_each(device: torch.device) -> None:
    def cumulative(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    counter = torch.zeros(2, dtype=torch.int64, device=device)
    ids = torch.zeros(1, dtype=torch.int64, device=device)
    frames = torch.zeros(8, 16, device=device)
    cu_frames = torch.tensor([0, 8], device=device)
    cu = cumulative(0, 4)
    patches: dict[str, Any] = {"freq": 1, "patch_freq": 16, "patch_time": 2, "order": "time"}
    patches |= {"mean": torch.zeros(1, device=device), "scale": torch.ones(1, device=device)}
    philox_words(counter, ids, 1, purpose=Purpose.MASK)
    scores = patch_mad(frames, cu_frames, cu, (4,), **patches)
    visible, masked = select_tokens(cu, (4,), (2,), counter, ids, scores=scores)
    tokens = mask_gather(frames, cu_frames, cu, visible, **patches)
    ncut_scores(tokens, cumulative(0, 2), (2,))
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    dropout(tokens, 0.5, counter, rows, rows, site=0)
    wide = torch.zeros(2, 1 << 15, device=device)  # of as many values as a step has
    mask_scatter(wide, wide[0], visible, masked)
    masked_patch_loss(tokens, frames, cu_frames, cu, masked, **patches)
    patch_info_nce(tokens, tokens, cumulative(0, 2), (2,), axis="targets")
    heads = tokens.view(2, 2, 16)
    varlen_attention(heads, heads, heads, cumulative(0, 2), (2,))
    qkv = torch.stack([heads] * 3, dim=1)
    window_attention(qkv, torch.ones(2, device=device), torch.zeros(2, 2, 2, device=device), cumulative(0, 2))
