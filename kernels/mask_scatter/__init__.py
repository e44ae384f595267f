# SPDX-License-Identifier: Apache-2.0
"""Put encoded visible tokens and the mask token back in token order."""

from masktrain.kernels.mask_scatter.op import mask_scatter

__all__ = ["mask_scatter"]
