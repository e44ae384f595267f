# SPDX-License-Identifier: Apache-2.0
"""Squared error of predicted patches against the spectrogram at the masked tokens."""

from masktrain.kernels.masked_patch_loss.op import masked_patch_loss

__all__ = ["masked_patch_loss"]
