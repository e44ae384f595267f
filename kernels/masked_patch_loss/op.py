# SPDX-License-Identifier: Apache-2.0
"""The public face of masked_patch_loss: checks and dispatch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from masktrain.kernels._checks import FLOATS, check_devices, check_patches, check_tensor
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import not_unasked
from masktrain.kernels.masked_patch_loss import _native, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.masked_patch_loss, _triton.why_not, not_unasked),
    Implementation("native", _native.masked_patch_loss, _native.why_not),
    Implementation("reference", reference.masked_patch_loss, lambda *_: None),
)


def masked_patch_loss(
    pred: Tensor,
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    masked: Tensor,
    *,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
    norm_pix_loss: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Return the sum over all M * P values of (pred - target)^2, a scalar in at least float32.

    pred: (M, P) float, row m for token masked[m], P = patch_freq * patch_time. frames ... order: as in
    mask_gather, which defines the target. norm_pix_loss: standardise each target patch by its own mean and
    unbiased variance, (t - mean) / sqrt(var + 1e-6), cells past the clip's end (0) included
    (facebookresearch/mae:models_mae.py); needs P >= 2. Divide by M * P for the mean.

    Differentiable in pred; the spectrogram is data. Sums are float32, or float64 if pred or frames are.
    Raises TypeError or ValueError for a wrong dtype, shape, device or grid.
    """
    op = "masked_patch_loss"
    grid: dict[str, Any] = {"freq": freq, "patch_freq": patch_freq, "patch_time": patch_time, "order": order}
    check_patches(op, frames, cu_frames, cu_tokens, "masked", masked, mean=mean, scale=scale, **grid)
    values = patch_freq * patch_time
    check_tensor(op, "pred", pred, FLOATS, (masked.shape[0], values))
    check_devices(op, frames=frames, pred=pred)
    if norm_pix_loss and values < 2:
        raise ValueError(f"{op}: norm_pix_loss needs patches of at least 2 values, received {values}.")
    choice = choose(op, IMPLEMENTATIONS, pred, frames, request=implementation)
    return choice.function(
        pred,
        frames,
        cu_frames,
        cu_tokens,
        masked,
        mean=mean,
        scale=scale,
        norm_pix_loss=norm_pix_loss,
        **grid,
    )
