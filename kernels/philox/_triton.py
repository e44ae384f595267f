# SPDX-License-Identifier: Apache-2.0
"""philox_words in Triton: one Philox block per lane, four words stored side by side.

Not yet measured on a GPU. Bits: those of the reference, in every shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._triton import block_of, cdiv, jit, load_key, on, philox_4x32, tl, words_of

# Blocks of four words per program.
BLOCKS = 256

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "philox_words_triton(Tensor counter, Tensor ids, SymInt n, SymInt purpose, SymInt stream) -> Tensor"
)


@jit(do_not_specialize=["n", "stream"])
def philox_words_kernel(
    out_ptr: tl.tensor,
    counter_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    n: tl.tensor,
    stream: tl.tensor,
    PURPOSE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    """out: (R, n) int64. Program (r, i) makes BLOCKS blocks of row r from block i * BLOCKS on."""
    row = tl.program_id(0)
    first = tl.program_id(1) * BLOCKS
    k0, k1, step = load_key(counter_ptr, PURPOSE)
    clip = tl.load(ids_ptr + row)
    blocks = (first + tl.arange(0, BLOCKS)).to(tl.uint32)
    words = words_of(*philox_4x32(blocks, stream.to(tl.uint32), clip.to(tl.uint32), step, k0, k1))
    position = first.to(tl.int64) * 4 + tl.arange(0, 4 * BLOCKS)
    tl.store(out_ptr + row.to(tl.int64) * n + position, words.to(tl.int64), mask=position < n)


def philox_words(counter: Tensor, ids: Tensor, n: int, *, purpose: int, stream: int) -> Tensor:
    """See `op.philox_words`."""
    return torch.ops.masktrain.philox_words_triton(counter, ids, n, purpose, stream)


@torch.library.impl(_library, "philox_words_triton", "CompositeExplicitAutograd")
def _philox_words(counter: Tensor, ids: Tensor, n: int, purpose: int, stream: int) -> Tensor:
    counter, ids = counter.contiguous(), ids.contiguous()
    out = ids.new_empty((ids.shape[0], n))
    if out.numel():
        blocks = block_of(cdiv(n, 4), most=BLOCKS)
        with on(ids):
            philox_words_kernel[(ids.shape[0], cdiv(n, 4 * blocks))](
                out, counter, ids, n, stream, PURPOSE=purpose, BLOCKS=blocks
            )
    return out


@torch.library.register_fake("masktrain::philox_words_triton", lib=_library)
def _philox_words_fake(counter: Tensor, ids: Tensor, n: int, purpose: int, stream: int) -> Tensor:
    return ids.new_empty((ids.shape[0], n))
