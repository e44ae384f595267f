# SPDX-License-Identifier: Apache-2.0
"""The mean absolute deviation of every patch of a packed spectrogram, exactly, in one read."""

from masktrain.kernels.patch_mad.op import patch_mad

__all__ = ["patch_mad"]
