# SPDX-License-Identifier: Apache-2.0
"""patch_info_nce ahead of time, forward and both gradients: square patches and pairs of whole frames."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels._triton import DTYPES
from masktrain.kernels.patch_info_nce._triton import patch_info_nce


def both_ways(dtype: torch.dtype, width: int) -> None:
    pred = torch.zeros(48, width, dtype=dtype, requires_grad=True)
    target = torch.zeros(48, width, requires_grad=True)
    patch_info_nce(pred, target, torch.tensor([0, 48]).int(), (48,), axis="targets").backward()


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case(f"256, {str(dtype)[6:]}", lambda dtype=dtype: both_ways(dtype, 256))
    yield Case("128, float32", lambda: both_ways(torch.float32, 128))
