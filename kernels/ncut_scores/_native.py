# SPDX-License-Identifier: Apache-2.0
"""ncut_scores by the native library: clip by clip in the cache, without a matrix of products."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels import _native

# As in csrc/cpu/ncut_scores.cpp.
LANES, BLOCK = 16, 4


def why_not(features: Tensor, bipartition: str, gram: str) -> str | None:
    """Return None if the native library serves these arguments, else why not."""
    if features.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {features.device}"
    if features.dtype == torch.float64:
        return "the native library computes in float32, and float64 was given"
    if bipartition == "unnormalised":
        return "the native library has no dense eigenvectors, which 'unnormalised' takes"
    if gram == "explicit":
        return "the native library forms no matrix of products, and gram='explicit' was asked for"
    return _native.why_not()


def ncut_scores(
    features: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    *,
    rule: str,
    bipartition: str,
    gram: str,
) -> tuple[Tensor, Tensor]:
    """See op.py. Returns scores and foreground."""
    x = features.detach().to(torch.float32).contiguous()
    total, longest, threads = sum(n_tokens), max(n_tokens, default=0), _native.threads()
    stride = (x.shape[1] + LANES) // LANES * LANES
    workspace = torch.empty(threads * (longest * (stride + 2 + 5 * BLOCK) + BLOCK * stride))
    scores, foreground = torch.empty(total), torch.empty(total, dtype=torch.bool)
    cu = cu_tokens.to(torch.int64).contiguous()
    _native.require().mt_ncut_scores(
        scores.data_ptr(), foreground.data_ptr(), x.data_ptr(), cu.data_ptr(), len(n_tokens), x.shape[1],
        bipartition == "pca", rule == "s1_code", workspace.data_ptr(), longest, threads,
    )  # fmt: skip
    return scores, foreground
