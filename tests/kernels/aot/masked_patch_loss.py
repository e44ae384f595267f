# SPDX-License-Identifier: Apache-2.0
"""masked_patch_loss ahead of time, forward and backward: square patches standardised, and pairs of whole frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels._triton import DTYPES
from masktrain.kernels.masked_patch_loss._triton import masked_patch_loss


def both_ways(dtype: torch.dtype, options: dict) -> None:
    frames, masked = torch.zeros(64, 128), torch.zeros(100, dtype=torch.int32)
    cu = torch.zeros(17, dtype=torch.int32)
    pred = torch.zeros(100, 256, dtype=dtype, requires_grad=True)
    masked_patch_loss(pred, frames, cu.long(), cu, masked, **options).backward()


def cases() -> Iterator[Case]:
    one, per_bin = (
        {"mean": torch.zeros(1), "scale": torch.ones(1)},
        {"mean": torch.zeros(128), "scale": torch.ones(128)},
    )
    square = {
        "freq": 8,
        "patch_freq": 16,
        "patch_time": 16,
        "order": "freq",
        "norm_pix_loss": True,
        **per_bin,
    }
    whole = {"freq": 1, "patch_freq": 128, "patch_time": 2, "order": "time", "norm_pix_loss": False, **one}
    for name, options in (("square, standardised", square), ("whole", whole)):
        for dtype in DTYPES:
            yield Case(
                f"{name}, {str(dtype)[6:]}", lambda dtype=dtype, options=options: both_ways(dtype, options)
            )
