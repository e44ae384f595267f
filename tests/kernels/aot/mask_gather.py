# SPDX-License-Identifier: Apache-2.0
"""mask_gather ahead of time: square patches in frequency order, and pairs of whole frames in time order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels._triton import DTYPES
from masktrain.kernels.mask_gather._triton import mask_gather


def cases() -> Iterator[Case]:
    frames, index = torch.zeros(64, 128), torch.zeros(10, dtype=torch.int32)
    cu = torch.zeros(17, dtype=torch.int32)
    square = {"freq": 8, "patch_freq": 16, "patch_time": 16, "order": "freq"}
    whole = {"freq": 1, "patch_freq": 128, "patch_time": 2, "order": "time"}
    for name, grid, size in (("square", square, 128), ("whole", whole, 1)):
        for dtype in DTYPES:
            options = {"mean": torch.zeros(size), "scale": torch.ones(size), "dtype": dtype, **grid}
            yield Case(
                f"{name}, {str(dtype)[6:]}",
                lambda options=options: mask_gather(frames, cu.long(), cu, index, **options),
            )
