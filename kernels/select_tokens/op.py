# SPDX-License-Identifier: Apache-2.0
"""The public face of select_tokens: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import (
    INTS,
    check_counts,
    check_devices,
    check_draw,
    check_shared,
    check_tensor,
)
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked
from masktrain.kernels.select_tokens import _native, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.select_tokens, _triton.why_not, not_unasked),
    Implementation("native", _native.select_tokens, _native.why_not),
    Implementation("reference", reference.select_tokens, lambda *_: None),
)


def select_tokens(
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    n_visible: tuple[int, ...],
    counter: Tensor,
    clip_ids: Tensor,
    *,
    classes: Tensor | None = None,
    shared: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (visible (V,), masked (M,)) int32: token ids that count through the batch, both ascending.

    cu_tokens: (B+1,) int32, the cumulative n_tokens. n_visible: how many of each clip's tokens stay visible,
    exactly. counter: (2,) int64 [seed, step]. clip_ids: (B,) int64. classes: (N,) uint8, int32 or int64 in
    [0, 2^30), or None for all 0.

    Token t of a clip has the key (class, word), the word being Philox word t of purpose MASK with the clip's
    id; the n_visible smallest keys are visible, ties going to the lower token. So whole classes come first,
    and within the class that is cut the choice is uniform. A clip's choice depends on its id, its own tokens,
    the seed and the step, never on its neighbours. shared=True takes the words of id 0 for all clips, which
    then must have equal counts.

    No host sync. Raises TypeError or ValueError for a wrong dtype, shape, device or count.
    """
    op = "select_tokens"
    check_counts(op, "n_tokens", n_tokens)
    check_counts(op, "n_visible", n_visible, len(n_tokens))
    for clip, (visible, tokens) in enumerate(zip(n_visible, n_tokens, strict=True)):
        if visible > tokens:
            raise ValueError(
                f"{op}: n_visible must be at most the {tokens} tokens of clip {clip}, received {visible}."
            )
    check_tensor(op, "cu_tokens", cu_tokens, (torch.int32,), (len(n_tokens) + 1,))
    check_draw(op, counter, clip_ids, len(n_tokens))
    if classes is not None:
        check_tensor(op, "classes", classes, INTS, (sum(n_tokens),))
    check_devices(op, cu_tokens=cu_tokens, counter=counter, clip_ids=clip_ids, classes=classes)
    if shared:
        check_shared(op, n_tokens=n_tokens, n_visible=n_visible)
    choice = choose(op, IMPLEMENTATIONS, cu_tokens, n_tokens, request=implementation)
    return choice.function(cu_tokens, n_tokens, n_visible, counter, clip_ids, classes=classes, shared=shared)
