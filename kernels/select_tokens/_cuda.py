# SPDX-License-Identifier: Apache-2.0
"""select_tokens by native code on either device: the CPU library, or on a GPU the CUDA one, as one torch op.

The CUDA kernel gives a clip one thread block, holds its keys in shared memory and finds the last chosen one by at most
eight counts, eight bits at a time. Not yet measured on a GPU. Output: that of the reference, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from masktrain.kernels import _cuda_native
from masktrain.kernels.select_tokens import _native
from masktrain.kernels.select_tokens._triton import log2_table, to_device

# Tokens of a clip at most: their keys are held in the 64 KiB of shared memory that every GPU has.
MOST_TOKENS = 7936

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "select_tokens_cuda(Tensor cu_tokens, SymInt[] n_tokens, SymInt[] n_visible, Tensor counter, Tensor clip_ids, "
    "Tensor? classes, Tensor? scores, bool sample, bool shared, SymInt stream) -> (Tensor, Tensor)"
)


def why_not(cu_tokens: Tensor, n_tokens: tuple[int, ...]) -> str | None:
    """Return None if native code serves clips of so many tokens on the device of cu_tokens, else why not."""
    if cu_tokens.device.type != "cuda":
        return _native.why_not(cu_tokens, n_tokens)
    longest = max(n_tokens, default=0)
    if longest > MOST_TOKENS:
        return f"the CUDA kernel takes clips of at most {MOST_TOKENS} tokens, not {longest}"
    return _cuda_native.why_not(cu_tokens.device.index)


def not_unasked(cu_tokens: Tensor, n_tokens: tuple[int, ...]) -> str | None:
    """Return why native code that can serve does so only when asked for by name, or None."""
    del n_tokens
    return "the CUDA kernel is not yet measured on a GPU" if cu_tokens.device.type == "cuda" else None


def select_tokens(
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    n_visible: tuple[int, ...],
    counter: Tensor,
    clip_ids: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """See op.py."""
    if cu_tokens.device.type != "cuda":
        return _native.select_tokens(cu_tokens, n_tokens, n_visible, counter, clip_ids, **options)
    return torch.ops.masktrain.select_tokens_cuda(
        cu_tokens, n_tokens, n_visible, counter, clip_ids, **options
    )


@torch.library.impl(_library, "select_tokens_cuda", "CUDA")
def _select_tokens(
    cu_tokens: Tensor,
    n_tokens: Sequence[int],
    n_visible: Sequence[int],
    counter: Tensor,
    clip_ids: Tensor,
    classes: Tensor | None,
    scores: Tensor | None,
    sample: bool,
    shared: bool,
    stream: int,
) -> tuple[Tensor, Tensor]:
    visible = cu_tokens.new_empty(sum(n_visible))
    masked = cu_tokens.new_empty(sum(n_tokens) - sum(n_visible))
    cu_tokens, counter, clip_ids = (t.contiguous() for t in (cu_tokens, counter, clip_ids))
    classes, scores = (None if t is None else t.contiguous() for t in (classes, scores))
    equal = len(set(n_visible)) <= 1
    with torch.cuda.device(cu_tokens.device):
        cu_visible = None if equal else to_device([0, *accumulate(n_visible)], cu_tokens.device)
        table = log2_table(cu_tokens.device) if scores is not None and sample else None
        error = _cuda_native.require().mt_cuda_select_tokens(
            visible.data_ptr(),
            masked.data_ptr(),
            cu_tokens.data_ptr(),
            None if cu_visible is None else cu_visible.data_ptr(),
            n_visible[0] if n_visible else 0,
            len(n_tokens),
            counter.data_ptr(),
            clip_ids.data_ptr(),
            None if classes is None else classes.data_ptr(),
            0 if classes is None else classes.element_size(),
            None if scores is None else scores.data_ptr(),
            None if table is None else table.data_ptr(),
            stream,
            shared,
            max(n_tokens, default=0),
            _cuda_native.stream_of(cu_tokens),
        )
    _cuda_native.check(error, "select_tokens")
    return visible, masked


@torch.library.register_fake("masktrain::select_tokens_cuda", lib=_library)
def _select_tokens_fake(
    cu_tokens: Tensor, n_tokens: Sequence[int], n_visible: Sequence[int], *_: object
) -> tuple[Tensor, Tensor]:
    return cu_tokens.new_empty(sum(n_visible)), cu_tokens.new_empty(sum(n_tokens) - sum(n_visible))
