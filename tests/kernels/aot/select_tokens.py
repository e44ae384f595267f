# SPDX-License-Identifier: Apache-2.0
"""select_tokens ahead of time: a ten-second clip of square patches without classes, and the longest with them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels.select_tokens._triton import MOST_TOKENS, select_tokens


def call(n_tokens: tuple[int, ...], n_visible: tuple[int, ...], classes: torch.Tensor | None) -> None:
    cu, counter = torch.zeros(len(n_tokens) + 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    ids = torch.zeros(len(n_tokens), dtype=torch.int64)
    select_tokens(cu, n_tokens, n_visible, counter, ids, classes=classes, shared=False)


def cases() -> Iterator[Case]:
    yield Case("512", lambda: call((512,) * 4, (128,) * 4, None))
    classes = torch.zeros(MOST_TOKENS + 512, dtype=torch.uint8)
    yield Case("ragged, classes", lambda: call((MOST_TOKENS, 512), (4096, 128), classes))
