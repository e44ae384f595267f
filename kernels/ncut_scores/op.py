# SPDX-License-Identifier: Apache-2.0
"""The public face of ncut_scores: checks and dispatch."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from masktrain.kernels._checks import (
    FLOATS,
    check_choice,
    check_counts,
    check_devices,
    check_no_gradient,
    check_tensor,
)
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels.ncut_scores import _native, reference

Rule = Literal["paper", "s1_code"]
Bipartition = Literal["ncut", "pca", "unnormalised"]
Gram = Literal["auto", "explicit", "implicit"]

IMPLEMENTATIONS = (
    Implementation("native", _native.ncut_scores, _native.why_not),
    Implementation("reference", reference.ncut_scores, lambda *_: None),
)


def ncut_scores(
    features: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    *,
    rule: Rule = "paper",
    bipartition: Bipartition = "ncut",
    gram: Gram = "auto",
    implementation: str | None = None,
) -> Tensor:
    """Return (N,) scores in [0, 1], float32 (float64 for float64): the larger a token's score, the sooner self-guided
    masking masks it.

    features: (N, D) float, one row per token, of which the direction alone counts: rows are divided by their norms.
    cu_tokens: (B+1,) int32, the cumulative n_tokens.

    bipartition cuts the tokens of each clip in two. With x the normalised rows:
    - "ncut": the normalised cut (Shi and Malik, PAMI 22, 2000) of the affinity 1 + cos, which is never negative: the
      generalised eigenvector of the second smallest eigenvalue of (D - W) y = l D y, split at its mean.
    - "pca": the leading principal direction, split at the mean projection: nttcslab/m2d's fork
      jstgermainsensortech/m2d:m2d/masking.py, build_C_pca_batched, with the exact direction in the place of the
      randomised one there.
    - "unnormalised": the eigenvector at index 1 of D - W with W = cos + 1e-12, split at 0: build_C_spectral_batched
      there. It takes a batched `eigh`, slow on a GPU, where it also waits for the device, and is meant for
      comparisons alone. Where cosines are negative, this need not be the second smallest in any useful sense.

    The foreground is the side with the largest |entry| of the vector (Wang et al., TokenCut, CVPR 2022, section 3.2).
    Where the sides' largest entries differ by less than 0.1 %, it is the side with fewer tokens, and of equal ones that
    without the clip's first token: what rounding decides must not decide over the mask.

    rule says what the scores are, with centroids the normalised means of the sides' rows:
    - "paper": (1 + cos to the centroid of the foreground) / 2, so that the most relevant tokens are masked (Bao et al.,
      Self-Guided Masked Autoencoder, NeurIPS 2024).
    - "s1_code": (1 - the larger cos to either centroid) / 2, so that what fits neither side is masked, as the code of
      the masking paper does (object_centric_mask_with_hint, ibidem).

    gram: how the eigenvector of "ncut" and "pca" is computed, which changes results by rounding alone. "explicit" forms
    the N x N products once, "implicit" never does; "auto" leaves it to the implementation.

    Products are in float32, or in float64 for float64, whatever autocast or TF32 say. A clip's scores do not depend on
    its neighbours, on the CPU to the bit, elsewhere but for rounding. A row of zeros, or with anything that is not finite, has cos 0 to everything. A
    clip whose rows are all equal has no two sides: all is foreground, and all scores are equal to rounding; so of a
    clip with a single token. No gradient, and no host sync but for "unnormalised". Raises TypeError or ValueError for a
    wrong dtype, shape, device, count or name.
    """
    return _solve("ncut_scores", features, cu_tokens, n_tokens, rule, bipartition, gram, implementation)[0]


def ncut_foreground(
    features: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    *,
    bipartition: Bipartition = "ncut",
    gram: Gram = "auto",
    implementation: str | None = None,
) -> Tensor:
    """Return (N,) bool: True for the foreground of the two sides that `ncut_scores` finds with these arguments."""
    return _solve(
        "ncut_foreground", features, cu_tokens, n_tokens, "paper", bipartition, gram, implementation
    )[1]


def _solve(
    op: str,
    features: Tensor,
    cu_tokens: Tensor,
    n_tokens: tuple[int, ...],
    rule: Rule,
    bipartition: Bipartition,
    gram: Gram,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """Return scores and foreground, after the checks."""
    check_counts(op, "n_tokens", n_tokens)
    check_tensor(op, "features", features, FLOATS, (sum(n_tokens), "D"))
    check_tensor(op, "cu_tokens", cu_tokens, (torch.int32,), (len(n_tokens) + 1,))
    check_choice(op, "rule", rule, get_args(Rule))
    check_choice(op, "bipartition", bipartition, get_args(Bipartition))
    check_choice(op, "gram", gram, get_args(Gram))
    check_devices(op, features=features, cu_tokens=cu_tokens)
    check_no_gradient(op, features=features)
    choice = choose("ncut_scores", IMPLEMENTATIONS, features, bipartition, gram, request=implementation)
    found: tuple[Tensor, Tensor] = choice.function(
        features, cu_tokens, n_tokens, rule=rule, bipartition=bipartition, gram=gram
    )
    return found
