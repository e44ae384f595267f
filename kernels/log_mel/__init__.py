# SPDX-License-Identifier: Apache-2.0
"""Packed waveforms to packed log-mel frames."""

from masktrain.kernels.log_mel.op import log_mel
from masktrain.kernels.log_mel.spec import MelSpec, spec_problem

__all__ = ["MelSpec", "log_mel", "spec_problem"]
