# SPDX-License-Identifier: Apache-2.0
"""Read chosen patches from a packed spectrogram: normalised, cast, flattened."""

from masktrain.kernels.mask_gather.op import mask_gather

__all__ = ["mask_gather"]
