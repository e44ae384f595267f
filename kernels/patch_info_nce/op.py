# SPDX-License-Identifier: Apache-2.0
"""The public face of patch_info_nce: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import FLOATS, check_choice, check_counts, check_devices, check_tensor
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels.patch_info_nce import _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.patch_info_nce, _triton.why_not, _triton.not_unasked),
    Implementation("reference", reference.patch_info_nce, lambda *_: None),
)


def patch_info_nce(
    pred: Tensor,
    target: Tensor,
    cu_masked: Tensor,
    n_masked: tuple[int, ...],
    *,
    axis: str,
    implementation: str | None = None,
) -> Tensor:
    """Return the sum over all M tokens of -log softmax(logits)[i, i], a scalar in at least float32.

    pred, target: (M, P) float, packed by clip: the predictions of the masked tokens and their patches.
    cu_masked: (B+1,) int32. n_masked: tokens of each clip, with the sum M. The logit of (i, j) is pred_i .
    target_j, raw (no temperature, no normalisation), for i and j of the same clip only.

    axis "targets": the softmax of prediction i runs over the targets j (AlanBaade/MAE-AST-Public:
    mae_ast/criterions/mae_ast_criterion.py, and the formula of the SSAST paper); axis "predictions": the
    softmax of target i runs over the predictions j (YuanGongND/ssast:src/models/ast_models.py).

    Differentiable in both; saved for backward are pred, target and M numbers. Logits and sums are float32, or
    float64 if pred or target are. Raises TypeError or ValueError for a wrong dtype, shape, device, count or
    axis.
    """
    op = "patch_info_nce"
    check_tensor(op, "pred", pred, FLOATS, ("M", "P"))
    check_tensor(op, "target", target, FLOATS, tuple(pred.shape))
    check_counts(op, "n_masked", n_masked)
    if sum(n_masked) != pred.shape[0]:
        raise ValueError(
            f"{op}: n_masked must add up to the {pred.shape[0]} rows of pred, received {sum(n_masked)}."
        )
    check_tensor(op, "cu_masked", cu_masked, (torch.int32,), (len(n_masked) + 1,))
    check_choice(op, "axis", axis, ("targets", "predictions"))
    check_devices(op, pred=pred, target=target, cu_masked=cu_masked)
    choice = choose(op, IMPLEMENTATIONS, pred, target, request=implementation)
    return choice.function(pred, target, cu_masked, n_masked, axis=axis)
