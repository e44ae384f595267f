# SPDX-License-Identifier: Apache-2.0
"""Full attention within each clip of a packed batch."""

from masktrain.kernels.varlen_attention.op import varlen_attention

__all__ = ["varlen_attention"]
