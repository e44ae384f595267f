# SPDX-License-Identifier: Apache-2.0
"""Counter-based random words (Philox 4x32-10): the source of every random choice."""

from masktrain.kernels.philox.op import philox_words, uniform
from masktrain.kernels.philox.reference import Purpose, host_words

__all__ = ["Purpose", "host_words", "philox_words", "uniform"]
