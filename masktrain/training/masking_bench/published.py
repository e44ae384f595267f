# SPDX-License-Identifier: Apache-2.0
"""Inverse block and self-guided masking the way published code draws them: what ours is compared with, and no more.

Nothing here is offered for training. All clips have equally many tokens, as those codes require, and each function ends
with what they hand to the model: (B, L) token numbers, the visible ones first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize


def inverse_block_loop(
    clips: int,
    rows: int,
    columns: int,
    mask_ratio: float,
    device: torch.device,
    *,
    side: int = 5,
    adjust: float = 0.07,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return (clips, rows * columns) int64, made on the host clip by clip and then copied to the device.

    With p = 1 - mask_ratio: int(L (p + adjust) / side^2) centres with replacement, side x side blocks clamped into the
    grid, and then for each clip cells dropped or added at random until int(L p) are visible
    (cwx-worst-one/EAT:utils/data_utils.py; jstgermainsensortech/m2d:m2d/masking.py calls it within the forward pass).
    """
    tokens, shown = rows * columns, 1 - mask_ratio
    blocks = block_cells(clips, rows, columns, int(tokens * ((shown + adjust) / side**2)), side, generator)
    visible = torch.zeros(clips, tokens).scatter_(1, blocks, 1.0)
    target = int(tokens * shown)
    for clip in visible:
        surplus = int(clip.sum()) - target
        if surplus > 0:
            clip[torch.multinomial(clip, surplus, generator=generator)] = 0
        elif surplus < 0:
            clip[torch.multinomial(1 - clip, -surplus, generator=generator)] = 1
    return visible.to(device).argsort(dim=1, descending=True)


def block_cells(
    clips: int, rows: int, columns: int, count: int, side: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return (clips, count * side^2) int64, the cells of `count` blocks, some of them several times."""
    centres = torch.randint(rows * columns, (clips, count), generator=generator)
    reach = torch.arange(side) - side // 2
    row = (centres[..., None] // columns + reach).clamp(0, rows - 1)
    column = (centres[..., None] % columns + reach).clamp(0, columns - 1)
    return (row[..., :, None] * columns + column[..., None, :]).flatten(1)


def eigh_side(features: Tensor, *, loop: bool = False) -> Tensor:
    """Return (B, N) bool, the bipartition of each clip's patches by a full eigendecomposition.

    features: (B, N, D). The eigenvector at index 1 of the unnormalised Laplacian of the cosines + 1e-12, split at 0
    (jstgermainsensortech/m2d:m2d/masking.py, build_C_spectral_batched). loop: one decomposition after the other, else
    one batched call.
    """
    x = normalize(features.float(), dim=-1)
    affinity = x @ x.mT + 1e-12
    laplacian = affinity.sum(-1).diag_embed() - affinity
    if loop:
        vectors = torch.stack([torch.linalg.eigh(one)[1] for one in laplacian])
    else:
        vectors = torch.linalg.eigh(laplacian)[1]
    return vectors[:, :, 1] >= 0


def pca_side(features: Tensor) -> Tensor:
    """Return (B, N) bool, the bipartition by a randomised first principal direction, which has not converged.

    features: (B, N, D). What that code runs, its spectral form being commented out (build_C_pca_batched).
    """
    x = normalize(features.float(), dim=-1)
    return above_mean(x, torch.pca_lowrank(x, q=1)[2])


def above_mean(x: Tensor, direction: Tensor) -> Tensor:
    """Return (B, N) bool, whether the projection of x (B, N, D), not centred, on direction (B, D, 1) is above its mean."""
    projection = (x @ direction).squeeze(-1)
    return projection > projection.mean(dim=-1, keepdim=True)


def centroid_scores(features: Tensor, bipartition: Callable[[Tensor], Tensor]) -> Tensor:
    """Return (B, N) float32, the larger of a patch's cosines to the mean directions of both sides."""
    x = normalize(features.float(), dim=-1)
    side = bipartition(features)
    centres = normalize(torch.stack([side, ~side], dim=1).to(x.dtype) @ x, dim=-1)
    return (x @ centres.mT).amax(dim=-1)


def lowest_masked(
    scores: Tensor, mask_ratio: float, hint: float, generator: torch.Generator | None = None
) -> Tensor:
    """Return (B, N) int64: the patches of the lowest scores are masked, and then a share `hint` of them exchanged.

    Of the M masked ones int(M * hint) are revealed at random, and as many of all that are then visible are masked
    (jstgermainsensortech/m2d:m2d/masking.py).
    """
    clips, tokens = scores.shape
    masked = torch.zeros(clips, tokens, dtype=torch.bool, device=scores.device)
    count = tokens - int(tokens * (1 - mask_ratio))
    masked.scatter_(1, scores.argsort(dim=1)[:, :count], True)
    exchanged = int(count * hint)
    for value in (False, True):
        keys = torch.rand(clips, tokens, device=scores.device, generator=generator)
        candidates = keys.masked_fill(masked == value, -1.0)
        masked.scatter_(1, candidates.topk(exchanged, dim=1).indices, value)
    return (~masked).to(torch.uint8).argsort(dim=1, descending=True)
