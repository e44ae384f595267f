# SPDX-License-Identifier: Apache-2.0
"""select_tokens ahead of time: a ten-second clip of square patches, and the longest with classes; without and with
scores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels.select_tokens._triton import MOST_TOKENS, select_tokens


def call(
    n_tokens: tuple[int, ...],
    n_visible: tuple[int, ...],
    classes: torch.Tensor | None = None,
    **scores: object,
) -> None:
    cu, counter = torch.zeros(len(n_tokens) + 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    ids = torch.zeros(len(n_tokens), dtype=torch.int64)
    options = {"scores": None, "sample": True, "shared": False, "stream": 1} | scores
    select_tokens(cu, n_tokens, n_visible, counter, ids, classes=classes, **options)


def cases() -> Iterator[Case]:
    yield Case("512", lambda: call((512,) * 4, (128,) * 4))
    few = torch.zeros(4 * 512)
    yield Case("512, scores", lambda: call((512,) * 4, (128,) * 4, scores=few))
    yield Case("512, largest scores", lambda: call((512,) * 4, (128,) * 4, scores=few, sample=False))
    classes = torch.zeros(MOST_TOKENS + 512, dtype=torch.uint8)
    many = torch.zeros(len(classes))
    yield Case("ragged, classes", lambda: call((MOST_TOKENS, 512), (4096, 128), classes))
    yield Case("ragged, classes, scores", lambda: call((MOST_TOKENS, 512), (4096, 128), classes, scores=many))
