# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss of predicted patches against the patches of the same clip."""

from masktrain.kernels.patch_info_nce.op import patch_info_nce

__all__ = ["patch_info_nce"]
