# SPDX-License-Identifier: Apache-2.0
"""dropout ahead of time; its backward is the same kernel."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels._triton import DTYPES
from masktrain.kernels.dropout._triton import dropout


def cases() -> Iterator[Case]:
    counter, rows = torch.zeros(2, dtype=torch.int64), torch.zeros(100, dtype=torch.int64)
    for dtype in DTYPES:
        x = torch.zeros(100, 768, dtype=dtype)
        yield Case(str(dtype)[6:], lambda x=x: dropout(x, 6554, counter, rows, rows, site=3))
