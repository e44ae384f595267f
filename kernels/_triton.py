# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels share: whether they can serve and why not, and random words on the device.

A machine without Triton is a normal machine: this module and the kernels' modules import there as well, `why_not`
says what is missing, and every op has another implementation.

With TRITON_INTERPRET=1 in the environment before this module is imported, Triton runs the kernels in its
interpreter, on CPU tensors too: slow, for tests. There they serve only when they are asked for by name.

Rules for kernels. Arguments are annotated with tl.tensor or tl.constexpr: compiled Triton looks at annotations. In
the interpreter bfloat16 is a bit pattern without arithmetic: kernels cast to float32 right after `tl.load` and back
at `tl.store`. Counts that vary from batch to batch are in `do_not_specialize`, else 1 and the multiples of 16 are
compiled apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from masktrain.kernels._checks import dtype_names

# Why there is no Triton, or None.
MISSING: str | None = None
try:
    import triton
    import triton.language as tl

    jit: Callable[..., Any] = triton.jit
except (ImportError, OSError) as error:
    MISSING = f"triton cannot be imported ({error}); `pip install triton`"
    tl = None

    def jit(function: Any = None, **options: Any) -> Any:
        """Stand in for triton.jit: the kernel exists and is never run."""
        return function if function is not None else jit


# Triton decides when it makes a kernel, which is when the kernels' modules are imported.
INTERPRETED = MISSING is None and bool(triton.knobs.runtime.interpret)

# What the kernels read and write; they compute in float32.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The oldest GPU that Triton's code generator still accepts (V100), for kernels without tl.dot.
OLDEST = (7, 0)


def why_not(x: Tensor, *dtypes: torch.dtype, allowed: Sequence[torch.dtype] = DTYPES) -> str | None:
    """Return None if Triton can serve on the device of `x`, else why not. `dtypes`: each must be in `allowed`.

    The dtype of x itself is not looked at unless it is among `dtypes`. What is interpreted serves only by request:
    see `not_unasked`.
    """
    for dtype in dtypes:
        if dtype not in allowed:
            return f"the Triton kernel takes {dtype_names(allowed)}, not {dtype_names([dtype])}"
    if x.device.type == "cpu":
        return _why_not_cpu()
    if x.device.type != "cuda":
        return f"the Triton kernels serve CUDA devices, and these tensors are on {x.device}"
    return _why_not_cuda(x.device.index or 0)


def not_unasked(x: Tensor, *_: Any) -> str | None:
    """Return why Triton, though it can serve on the device of `x`, does not unless it is asked for by name."""
    if INTERPRETED:
        return "Triton's interpreter is on, which serves only when triton is asked for by name"
    return None


def unmeasured(x: Tensor, *_: Any) -> str | None:
    """As `not_unasked`, for a kernel that no GPU has measured yet."""
    return not_unasked(x) or "the Triton kernel is not yet measured on a GPU"


@torch.compiler.assume_constant_result
def _why_not_cpu() -> str | None:
    if INTERPRETED:
        return None
    return "the Triton kernels serve CUDA devices; TRITON_INTERPRET=1, set before the start, interprets them on the CPU"


@torch.compiler.assume_constant_result
def _why_not_cuda(index: int) -> str | None:
    if MISSING is None and torch.cuda.get_device_capability(index) < OLDEST:
        return f"Triton needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
    return MISSING


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels are launched on the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def block_of(n: int, least: int = 1, most: int = 1 << 20) -> int:
    """Return the smallest power of two that is at least `n`, within [least, most], both powers of two."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up, for a >= 0 and b > 0."""
    return -(-a // b)


# Random words. `philox/reference.py` is the definition; the bits are the same.


@jit
def load_key(counter_ptr: tl.tensor, PURPOSE: tl.constexpr) -> tl.tensor:
    """Return (k0, k1, step): the two key words of a (2,) int64 counter [seed, step], and the last counter word.

    All three are scalars: k0 and k1 int64 in [0, 2^32), step uint32.
    """
    seed = tl.load(counter_ptr)
    step = tl.load(counter_ptr + 1)
    k0 = seed & 0xFFFFFFFF
    k1 = ((seed >> 32) & 0xFFFF) | ((tl.zeros_like(seed) + PURPOSE) << 16)
    return k0, k1, step.to(tl.uint32)


@jit
def philox_4x32(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tl.tensor:
    """Return the four words of each Philox 4x32-10 block, uint32 in the common shape of c0 ... c3.

    c0 ... c3: uint32 scalars or blocks that broadcast. k0, k1: scalars, int64 in [0, 2^32) (`load_key`).
    """
    for _ in tl.static_range(10):
        # A 32 x 32 -> 64 bit product is one instruction, and the interpreter warns of products that wrap.
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1.to(tl.uint32)
        c1 = (product1 & 0xFFFFFFFF).to(tl.uint32)
        c3 = (product0 & 0xFFFFFFFF).to(tl.uint32)
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@jit
def words_of(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor) -> tl.tensor:
    """Return the words of blocks (..., n) in the order of their stream: (..., 4 n), word 4 b + i is w_i of block b."""
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@jit
def halves_of(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor) -> tl.tensor:
    """Return the 16-bit halves of blocks (..., n) as uint32 (..., 8 n): half 8 b + h is half h of block b.

    Half h of a block is the low (h even) or the high (h odd) 16 bits of its word h // 2.
    """
    words = words_of(w0, w1, w2, w3)
    return tl.interleave(words & 0xFFFF, words >> 16)
