# SPDX-License-Identifier: Apache-2.0
"""The public face of patch_mad: checks and dispatch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from masktrain.kernels._checks import check_counts, check_patches
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked
from masktrain.kernels.patch_mad import _native, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.patch_mad, _triton.why_not, not_unasked),
    Implementation("native", _native.patch_mad, _native.why_not),
    Implementation("reference", reference.patch_mad, lambda *_: None),
)


def patch_mad(
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    *,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
    implementation: str | None = None,
) -> Tensor:
    """Return (N,) float32: the mean absolute deviation from its mean of each of the N = sum(n_tokens) patches, the
    weight of dispersion-weighted masking.

    frames, cu_frames, cu_tokens, mean, scale and the grid are those of mask_gather, which says what the values of a
    patch are: (frame - mean) * scale in the dtype of frames, and 0 past the clip's end. n_tokens: the tokens of each
    clip, of which cu_tokens is the sum.

    A value x is rounded to x' / 1024, half to even, and clamped to [-16, 16]; NaN is 0. With n values in a patch, S =
    sum of |n x' - sum of x'| is an integer, exact in any order of addition. The score is float32(S) * float32(1 /
    (1024 n^2)), one multiplication in float32: the same bits everywhere, and within 1 / 1024 of the deviation of
    values that were not clamped.

    The spectrogram is data: no gradient flows to it. No host sync. Raises TypeError or ValueError for a wrong dtype,
    shape, device, count or grid.
    """
    op = "patch_mad"
    grid: dict[str, Any] = {"freq": freq, "patch_freq": patch_freq, "patch_time": patch_time, "order": order}
    # All tokens are asked for: there is no index beside cu_tokens.
    check_patches(op, frames, cu_frames, cu_tokens, "cu_tokens", cu_tokens, mean=mean, scale=scale, **grid)
    check_counts(op, "n_tokens", n_tokens, cu_tokens.shape[0] - 1)
    for clip, tokens in enumerate(n_tokens):
        if tokens % freq:
            raise ValueError(
                f"{op}: n_tokens must be multiples of freq = {freq}, received {tokens} for clip {clip}."
            )
    choice = choose(op, IMPLEMENTATIONS, frames, patch_freq * patch_time, request=implementation)
    return choice.function(frames, cu_frames, cu_tokens, n_tokens, mean=mean, scale=scale, **grid)
