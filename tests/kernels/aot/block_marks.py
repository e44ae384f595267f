# SPDX-License-Identifier: Apache-2.0
"""block_marks ahead of time: chunks of MAE-AST, blocks as the reference projects place them, and inverse blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels.block_marks._triton import block_marks, clamped_blocks


def call(n_tokens: tuple[int, ...], n_marked: tuple[int, ...], **options: object) -> None:
    cu, counter = torch.zeros(len(n_tokens) + 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    ids = torch.zeros(len(n_tokens), dtype=torch.int64)
    block_marks(
        cu, n_tokens, n_marked, counter, ids, freq=8, sides=(3, 4, 5), shared=False, stream=1, **options
    )


def call_clamped(n_tokens: tuple[int, ...], blocks: tuple[int, ...], freq: int, order: str) -> None:
    cu, counter = torch.zeros(len(n_tokens) + 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    ids = torch.zeros(len(n_tokens), dtype=torch.int64)
    clamped_blocks(cu, n_tokens, blocks, counter, ids, freq=freq, order=order, side=5, shared=False, stream=1)


def cases() -> Iterator[Case]:
    ours = {"order": "time", "growth": "clipped", "truncation": "random", "spare_first": False}
    theirs = {"order": "freq", "growth": "wrap", "truncation": "first", "spare_first": True}
    yield Case("clipped", lambda: call((512,) * 4, (384,) * 4, **ours))
    yield Case("wrap, ragged", lambda: call((512, 1024), (384, 400), **theirs))
    yield Case("clamped", lambda: call_clamped((512,) * 4, (5,) * 4, 8, "time"))
    yield Case("clamped, ragged", lambda: call_clamped((190, 100), (2, 1), 5, "freq"))
