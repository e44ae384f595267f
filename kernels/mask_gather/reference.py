# SPDX-License-Identifier: Apache-2.0
"""The definition of mask_gather in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_gather(
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    index: Tensor,
    *,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
    dtype: torch.dtype,
) -> Tensor:
    """See op.py."""
    if index.numel() == 0:
        return frames.new_empty(0, patch_freq * patch_time, dtype=dtype)
    # The clip of a token is the last one that starts at or before it: clips without tokens are stepped over.
    clip = torch.searchsorted(cu_tokens, index.contiguous(), right=True) - 1
    first = cu_tokens[clip]
    token = (index - first).long()
    columns = (cu_tokens[clip + 1] - first).long() // freq
    if order == "time":
        column, row = token // freq, token % freq
    else:
        row, column = token // columns, token % columns

    frame = column[:, None] * patch_time + torch.arange(patch_time, device=frames.device)
    start = cu_frames[clip, None]
    inside = frame < cu_frames[clip + 1, None] - start
    frame = torch.where(inside, start + frame, 0)
    bins = row[:, None] * patch_freq + torch.arange(patch_freq, device=frames.device)
    if order == "time":
        frame, inside, bins = frame[:, :, None], inside[:, :, None], bins[:, None, :]
    else:
        frame, inside, bins = frame[:, None, :], inside[:, None, :], bins[:, :, None]
    mean = mean if mean.numel() == 1 else mean[bins]
    scale = scale if scale.numel() == 1 else scale[bins]
    values = torch.where(inside, (frames[frame, bins] - mean) * scale, 0)
    return values.flatten(1).to(dtype)
