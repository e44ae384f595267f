# SPDX-License-Identifier: Apache-2.0
"""window_attention: scaled cosine attention with a position bias inside small windows of consecutive rows."""

from masktrain.kernels.window_attention.op import IMPLEMENTATIONS, window_attention

__all__ = ["IMPLEMENTATIONS", "window_attention"]
