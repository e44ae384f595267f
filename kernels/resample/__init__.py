# SPDX-License-Identifier: Apache-2.0
"""Bring packed waveforms of any sample rates to one rate."""

from masktrain.kernels.resample.op import resample
from masktrain.kernels.resample.reference import resampled_length

__all__ = ["resample", "resampled_length"]
