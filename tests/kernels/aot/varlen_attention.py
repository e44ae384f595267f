# SPDX-License-Identifier: Apache-2.0
"""varlen_attention ahead of time, forward and backward: each tiling, and dtypes and head widths of the recipes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import TENSOR_CORES, Case

from masktrain.kernels.varlen_attention._triton import varlen_attention


def both_ways(dtype: torch.dtype, width: int, dropout_p: float) -> None:
    q, k, v = torch.zeros(40, 3, 4, width, dtype=dtype, requires_grad=True).unbind(1)
    key = {"counter": torch.zeros(2, dtype=torch.int64), "clip_ids": torch.arange(2), "site": 3}
    cu = torch.tensor([0, 30, 40]).int()
    varlen_attention(q, k, v, cu, (30, 10), dropout_p=dropout_p, **key).sum().backward()


def cases() -> Iterator[Case]:
    for dtype, width, dropout_p in (
        (torch.bfloat16, 64, 0.0),
        (torch.bfloat16, 64, 0.1),
        (torch.float16, 64, 0.1),
        (torch.bfloat16, 32, 0.1),
        (torch.bfloat16, 128, 0.1),
        (torch.float32, 64, 0.1),
    ):
        name = f"{str(dtype)[6:]}, {width}, {'dropout' if dropout_p else 'no dropout'}"
        yield Case(name, lambda a=(dtype, width, dropout_p): both_ways(*a), TENSOR_CORES)
