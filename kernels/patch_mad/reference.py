# SPDX-License-Identifier: Apache-2.0
"""The definition of patch_mad in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels.mask_gather.reference import mask_gather

# Steps of a value, and the largest value.
STEPS, LARGEST = 1024, 16


def factor(values: int) -> float:
    """Return what turns the sum of a patch of so many values into a score; it is used in float32."""
    return 1.0 / (STEPS * values * values)


def patch_mad(
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    *,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
) -> Tensor:
    """See op.py."""
    values = patch_freq * patch_time
    index = torch.arange(sum(n_tokens), dtype=torch.int32, device=frames.device)
    patches = mask_gather(
        frames, cu_frames, cu_tokens, index, mean=mean, scale=scale, freq=freq, patch_freq=patch_freq,
        patch_time=patch_time, order=order, dtype=frames.dtype,
    )  # fmt: skip
    x = torch.where(patches.isnan(), 0, patches).clamp(-LARGEST, LARGEST)
    # round() is half to even.
    steps = (x * STEPS).round().long()
    total = (values * steps - steps.sum(1, keepdim=True)).abs().sum(1)
    return total.to(torch.float32) * factor(values)
