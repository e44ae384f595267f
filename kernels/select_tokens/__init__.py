# SPDX-License-Identifier: Apache-2.0
"""Choose the visible tokens of each clip: exact counts, drawn by counter, in the order of classes."""

from masktrain.kernels.select_tokens.op import select_tokens

__all__ = ["select_tokens"]
