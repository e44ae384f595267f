# SPDX-License-Identifier: Apache-2.0
"""State dicts renamed: what the adapters of all reference projects share.

An adapter says, for each of our names, which names of the reference hold it (several where ours is their rows one
below the other) and in which shape. Shapes differ in axes of length one and in patches flattened: a tensor of the
reference is reshaped, never permuted, since both count the values of a patch in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from masktrain.errors import CheckpointError

Names = Callable[[str], tuple[str, ...]]
Shape = Callable[[str, tuple[int, ...]], tuple[int, ...]]


def same_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape as it is."""
    return shape


def export_named(state: Mapping[str, Tensor], names: Names, shape: Shape = same_shape) -> dict[str, Tensor]:
    """Return our `state` (or its gradients) under the reference's names. shape: of (reference name, our shape)."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        theirs = names(name)
        for one, value in zip(theirs, tensor.chunk(len(theirs)), strict=True):
            out[one] = value.reshape(shape(one, tuple(value.shape)))
    return out


def import_named(
    state: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    names: Names,
    ignored: Collection[str],
    shape: Shape = same_shape,
) -> dict[str, Tensor]:
    """Return the reference's `state` under our names, with the shapes and dtypes of `wanted`, our state dict.

    Raises CheckpointError naming every key that is missing, unknown (`ignored` apart) or of another shape.
    """
    out: dict[str, Tensor] = {}
    used: set[str] = set()
    problems: list[str] = []
    for name, tensor in wanted.items():
        theirs = names(name)
        used.update(theirs)
        missing = [n for n in theirs if n not in state]
        if missing:
            problems += [f"missing {n}" for n in missing]
            continue
        parts = tensor.chunk(len(theirs))
        wrong = [
            f"{n}: shape {tuple(state[n].shape)}, expected {shape(n, tuple(part.shape))}"
            for n, part in zip(theirs, parts, strict=True)
            if tuple(state[n].shape) != shape(n, tuple(part.shape))
        ]
        problems += wrong
        if not wrong:
            values = [state[n].reshape(part.shape) for n, part in zip(theirs, parts, strict=True)]
            out[name] = torch.cat(values).to(tensor.dtype) if len(values) > 1 else values[0].to(tensor.dtype)
    problems += [f"unknown {n}" for n in state if n not in used and n not in ignored]
    if problems:
        raise CheckpointError(
            f"weights: {len(problems)} of the names do not fit this model: {'; '.join(problems[:20])}"
            f"{' ...' if len(problems) > 20 else ''}. Take the model sizes and the patch of the checkpoint."
        )
    return out
