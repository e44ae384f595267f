# SPDX-License-Identifier: Apache-2.0
"""Dropout whose bits are a function of (seed, step, clip, position, site)."""

from masktrain.kernels.dropout.op import attention_keep_padded, dropout

__all__ = ["attention_keep_padded", "dropout"]
