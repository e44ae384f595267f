# SPDX-License-Identifier: Apache-2.0
"""Mark square blocks of each clip's token grid, until a count is exceeded or a number of blocks is placed."""

from masktrain.kernels.block_marks.op import block_marks

__all__ = ["block_marks"]
