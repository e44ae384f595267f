# SPDX-License-Identifier: Apache-2.0
"""Scores of patch features for self-guided masking: two sides by normalised cut, without an eigendecomposition."""

from masktrain.kernels.ncut_scores.op import ncut_foreground, ncut_scores

__all__ = ["ncut_foreground", "ncut_scores"]
