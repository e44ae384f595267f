# SPDX-License-Identifier: Apache-2.0
"""philox_words by the native library, as one torch op."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels import _native

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define("philox_words(Tensor counter, Tensor ids, SymInt n, SymInt purpose, SymInt stream) -> Tensor")


def why_not(ids: Tensor) -> str | None:
    """Return None if the native library serves ids like these, else why not."""
    if ids.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {ids.device}"
    return _native.why_not()


def philox_words(counter: Tensor, ids: Tensor, n: int, *, purpose: int, stream: int) -> Tensor:
    """See `op.philox_words`."""
    return torch.ops.masktrain.philox_words(counter, ids, n, purpose, stream)


@torch.library.impl(_library, "philox_words", "CPU")
def _philox_words(counter: Tensor, ids: Tensor, n: int, purpose: int, stream: int) -> Tensor:
    counter, ids = counter.contiguous(), ids.contiguous()
    out = ids.new_empty((ids.shape[0], n))
    _native.require().mt_philox_words(
        out.data_ptr(),
        counter.data_ptr(),
        ids.data_ptr(),
        ids.shape[0],
        n,
        purpose,
        stream,
        _native.threads(),
    )
    return out


@torch.library.register_fake("masktrain::philox_words", lib=_library)
def _philox_words_fake(counter: Tensor, ids: Tensor, n: int, purpose: int, stream: int) -> Tensor:
    return ids.new_empty((ids.shape[0], n))
