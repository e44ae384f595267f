# SPDX-License-Identifier: Apache-2.0
"""Which clip stands where: the permutation of each epoch, and the slices of steps, ranks and micro-batches.

Everything is a function of (seed, epoch, position): the state of a run in its data is the number of its next
step. Step s of global batch size B takes the sample indices s B ... s B + B - 1; index n is position n mod N
of epoch n // N.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from masktrain.errors import ConfigError
from masktrain.kernels.philox import Purpose, philox_words


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """Return the permutation of the clips 0 ... n-1 in an epoch: (n,) int64, read-only.

    Clips sorted by (word, clip), word p of the one stream (seed, ORDER, epoch) belonging to clip p. The
    results of the last calls are kept: two epochs of a training and of a validation set.
    """
    counter = torch.tensor([seed, epoch], dtype=torch.int64)
    words = philox_words(counter, torch.zeros(1, dtype=torch.int64), n, purpose=Purpose.ORDER)[0]
    permutation = np.argsort(words.numpy(), kind="stable").astype(np.int64, copy=False)
    permutation.setflags(write=False)
    return permutation


def clip_at(seed: int, sample_index: int, n: int) -> tuple[int, int]:
    """Return (epoch, clip id) of a sample index of a run over n clips."""
    epoch, position = divmod(sample_index, n)
    return epoch, int(order(seed, epoch, n)[position])


def batch_indices(step: int, batch_size: int, rank: int, world_size: int, accumulation: int) -> list[range]:
    """Return the sample indices of each micro-batch of a rank in a step; `check_shards` says what divides."""
    share = batch_size // world_size
    micro = share // accumulation
    first = step * batch_size + rank * share
    return [range(first + m * micro, first + (m + 1) * micro) for m in range(accumulation)]


def check_shards(batch_size: int, world_size: int, accumulation: int) -> None:
    """Raise ConfigError unless the micro-batches of all ranks make up the batch: disjoint, complete, in
    order."""
    parts = world_size * accumulation
    if batch_size < 1 or batch_size % parts:
        lower, upper = batch_size // parts * parts, (batch_size // parts + 1) * parts
        nearest = f"{lower} or {upper}" if lower > 0 else f"{upper}"
        raise ConfigError(
            f"batch_size: {batch_size} clips do not divide among {world_size} ranks x {accumulation} "
            f"micro-batches; allowed are multiples of {parts}, nearest {nearest}."
        )
    held = [
        i
        for rank in range(world_size)
        for r in batch_indices(0, batch_size, rank, world_size, accumulation)
        for i in r
    ]
    if held != list(range(batch_size)):
        raise AssertionError(
            f"the shards of {world_size} ranks do not make up a batch of {batch_size}: {held}"
        )
