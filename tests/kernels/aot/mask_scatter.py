# SPDX-License-Identifier: Apache-2.0
"""mask_scatter ahead of time, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels._triton import DTYPES
from masktrain.kernels.mask_scatter._triton import mask_scatter


def both_ways(dtype: torch.dtype) -> None:
    x = torch.zeros(10, 768, dtype=dtype, requires_grad=True)
    token = torch.zeros(768, requires_grad=True)
    mask_scatter(x, token, torch.arange(10).int(), torch.arange(10, 50).int()).sum().backward()


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        yield Case(str(dtype)[6:], lambda dtype=dtype: both_ways(dtype))
