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
    check_no_gradient,
    check_shared,
    check_tensor,
)
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked
from masktrain.kernels.philox.op import check_below
from masktrain.kernels.select_tokens import _cuda, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.select_tokens, _triton.why_not, not_unasked),
    Implementation("native", _cuda.select_tokens, _cuda.why_not, _cuda.not_unasked),
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
    scores: Tensor | None = None,
    sample: bool = True,
    shared: bool = False,
    stream: int = 0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (visible (V,), masked (M,)) int32: token ids that count through the batch, both ascending.

    cu_tokens: (B+1,) int32, the cumulative n_tokens. n_visible: how many of each clip's tokens stay visible,
    exactly. counter: (2,) int64 [seed, step]. clip_ids: (B,) int64. classes: (N,) uint8, int32 or int64 in
    [0, 2^30), or None for all 0. stream: in [0, 2^32), tells apart the masks that one step draws of a clip.

    Without scores, token t of a clip has the key (class, word), the word being Philox word t of purpose MASK and
    this stream with the clip's id; the n_visible smallest keys are visible, ties going to the lower token. So
    whole classes come first, and within the class that is cut the choice is uniform. A clip's choice depends on
    its id, its own tokens, the seed and the step, never on its neighbours. shared=True takes the words of id 0
    for all clips, which then must have equal counts.

    scores: (N,) float32, or None. Then a clip's n_tokens - n_visible largest (class, key) are MASKED, ties going
    to the lower token: the highest classes first, and within the class that is cut tokens are sampled without
    replacement with probability proportional to their score, key = log2 score - log2(-log2 u), u being the word
    + 1/2 over 2^32 (the largest keys of such a set are that sample: Efraimidis and Spirakis, Information
    Processing Letters 97, 2006). A score counts within [2^-40, 2^40]; NaN, 0 and negative ones are 2^-40. With
    sample=False the key is the score itself, of any size (NaN and negative ones are 0): the tokens of the largest
    scores are masked, and no word is drawn. Keys are integers, so the choice is the same everywhere.

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
    if scores is not None:
        check_tensor(op, "scores", scores, (torch.float32,), (sum(n_tokens),))
        check_no_gradient(op, scores=scores)
    elif not sample:
        raise ValueError(f"{op}: sample=False takes the largest scores and needs scores, received None.")
    check_below(op, "stream", stream, 1 << 32)
    check_devices(op, cu_tokens=cu_tokens, counter=counter, clip_ids=clip_ids, classes=classes, scores=scores)
    if shared:
        check_shared(op, n_tokens=n_tokens, n_visible=n_visible)
    choice = choose(op, IMPLEMENTATIONS, cu_tokens, n_tokens, request=implementation)
    return choice.function(
        cu_tokens,
        n_tokens,
        n_visible,
        counter,
        clip_ids,
        classes=classes,
        scores=scores,
        sample=sample,
        shared=shared,
        stream=stream,
    )
