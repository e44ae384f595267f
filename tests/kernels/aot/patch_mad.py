# SPDX-License-Identifier: Apache-2.0
"""patch_mad ahead of time: square patches in both orders, pairs of whole frames, and the largest patches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels.patch_mad._triton import patch_mad


def cases() -> Iterator[Case]:
    frames = torch.zeros(1024, 128)
    cu = torch.zeros(17, dtype=torch.int32)
    square = {"freq": 8, "patch_freq": 16, "patch_time": 16}
    whole = {"freq": 1, "patch_freq": 128, "patch_time": 2, "order": "time"}
    large = {"freq": 1, "patch_freq": 128, "patch_time": 32, "order": "time"}
    for name, grid, size in (
        ("square, freq", square | {"order": "freq"}, 1),
        ("square, time", square | {"order": "time"}, 128),
        ("whole", whole, 1),
        ("large", large, 1),
    ):
        options = {"mean": torch.zeros(size), "scale": torch.ones(size), **grid}
        yield Case(name, lambda options=options: patch_mad(frames, cu.long(), cu, (64,) * 16, **options))
