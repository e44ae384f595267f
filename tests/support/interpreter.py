# SPDX-License-Identifier: Apache-2.0
"""Makes bfloat16 of Triton's interpreter round and multiply as a GPU does.

The interpreter keeps bfloat16 as bit patterns. It cuts float32 off instead of rounding to nearest even, and `tl.dot`
multiplies the patterns as integers. Both are replaced; everything else that kernels may do with bfloat16 (load,
widen, store) is right already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def patch() -> None:
    """Replace both for this process."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            values = torch.from_numpy(np.array(src.data))
            return TensorHandle(
                values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16), tl.bfloat16
            )
        return cast(self, src, dst_type)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
