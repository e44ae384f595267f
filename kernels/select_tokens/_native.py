# SPDX-License-Identifier: Apache-2.0
"""select_tokens by the native library, as one torch op: the bits of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels.select_tokens.reference import LOG2

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "select_tokens(SymInt[] n_tokens, SymInt[] n_visible, Tensor counter, Tensor clip_ids, Tensor? classes, "
    "Tensor? scores, bool sample, bool shared, SymInt stream) -> (Tensor, Tensor)"
)


def why_not(cu_tokens: Tensor, n_tokens: tuple[int, ...]) -> str | None:
    """Return None if the native library serves clips of any sizes on the device of cu_tokens, else why not."""
    del n_tokens
    if cu_tokens.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {cu_tokens.device}"
    return _native.why_not()


def select_tokens(
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    n_visible: tuple[int, ...],
    counter: Tensor,
    clip_ids: Tensor,
    *,
    classes: Tensor | None,
    scores: Tensor | None,
    sample: bool,
    shared: bool,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """See op.py. The counts say where a clip lies; cu_tokens repeats them and is not read."""
    return torch.ops.masktrain.select_tokens(
        n_tokens, n_visible, counter, clip_ids, classes, scores, sample, shared, stream
    )


@torch.library.impl(_library, "select_tokens", "CPU")
def _select_tokens(
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
    counter, clip_ids = counter.contiguous(), clip_ids.contiguous()
    classes = None if classes is None else classes.contiguous()
    scores = None if scores is None else scores.contiguous()
    ends = torch.tensor([[0, *accumulate(n_tokens)], [0, *accumulate(n_visible)]])
    total, total_visible = sum(n_tokens), sum(n_visible)
    visible = torch.empty(total_visible, dtype=torch.int32)
    masked = torch.empty(total - total_visible, dtype=torch.int32)
    longest, threads = max(n_tokens, default=0), _native.threads()
    workspace = torch.empty(threads * (4 * longest + 32), dtype=torch.int64)
    _native.require().mt_select_tokens(
        visible.data_ptr(),
        masked.data_ptr(),
        ends[0].data_ptr(),
        ends[1].data_ptr(),
        len(n_tokens),
        counter.data_ptr(),
        clip_ids.data_ptr(),
        None if classes is None else classes.data_ptr(),
        0 if classes is None else classes.element_size(),
        None if scores is None else scores.data_ptr(),
        LOG2.data_ptr() if sample else None,
        stream,
        shared,
        workspace.data_ptr(),
        longest,
        threads,
    )
    return visible, masked


@torch.library.register_fake("masktrain::select_tokens", lib=_library)
def _select_tokens_fake(
    n_tokens: Sequence[int], n_visible: Sequence[int], counter: Tensor, clip_ids: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    total, total_visible = sum(n_tokens), sum(n_visible)
    return (
        clip_ids.new_empty(total_visible, dtype=torch.int32),
        clip_ids.new_empty(total - total_visible, dtype=torch.int32),
    )
