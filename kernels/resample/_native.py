# SPDX-License-Identifier: Apache-2.0
"""resample by the native library, as one torch op: the products of the reference without most of its zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels.resample.reference import Plan, resampled_length, weight_matrix

FUNCTIONS = {torch.float32: "mt_resample_f32", torch.float64: "mt_resample_f64"}
VECTOR_BYTES = 64
"""Outputs that share the samples they read: MT_RESAMPLE_GROUP of csrc/include/masktrain_c.h."""
ROWS = 64
"""MT_RESAMPLE_ROWS there."""
LARGEST_TABLE = 1 << 19
"""Weights of a ratio: 4 MiB in float64. 11025 to 32000 Hz has a third of that."""

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "resample(Tensor samples, SymInt[] lengths, SymInt[] rates, SymInt target_rate, ScalarType dtype) -> Tensor"
)


def why_not(samples: Tensor, rates: tuple[int, ...], target_rate: int) -> str | None:
    """Return None if the native library brings clips of these rates to `target_rate`, else why not."""
    if samples.device.type != "cpu":
        return f"the native library serves the CPU, and these tensors are on {samples.device}"
    for rate in set(rates):
        used = plan(rate, target_rate, torch.float64)
        if rate != target_rate and used.outputs * used.span > LARGEST_TABLE:
            return (
                f"the native library keeps at most {LARGEST_TABLE} weights for a ratio of rates, and {rate} to "
                f"{target_rate} Hz, in lowest terms {used.down} to {used.up}, needs {used.outputs * used.span}"
            )
    return _native.why_not()


def resample(
    samples: Tensor, lengths: tuple[int, ...], rates: tuple[int, ...], target_rate: int, *, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...]]:
    """See op.py."""
    out = torch.ops.masktrain.resample(samples, lengths, rates, target_rate, dtype)
    return out, _out_lengths(lengths, rates, target_rate)


def plan(rate: int, target_rate: int, dtype: torch.dtype) -> Plan:
    """Return the reference's plan with blocks of as many outputs as VECTOR_BYTES hold."""
    whole, width = Plan.make(rate, target_rate), VECTOR_BYTES // dtype.itemsize
    return replace(whole, width=width, blocks=-(-whole.outputs // width))


@lru_cache(maxsize=32)
def table(used: Plan, dtype: torch.dtype) -> Tensor:
    """Return the (blocks, span, width) weights of a plan."""
    return torch.stack([weight_matrix(used, block) for block in range(used.blocks)]).to(dtype)


def _out_lengths(lengths: Sequence[int], rates: Sequence[int], target_rate: int) -> tuple[int, ...]:
    return tuple(resampled_length(n, rate, target_rate) for n, rate in zip(lengths, rates, strict=True))


@torch.library.impl(_library, "resample", "CPU")
def _resample(
    samples: Tensor, lengths: Sequence[int], rates: Sequence[int], target_rate: int, dtype: torch.dtype
) -> Tensor:
    samples, threads = samples.to(dtype).contiguous(), _native.threads()
    out_lengths = _out_lengths(lengths, rates, target_rate)
    starts, out_starts = ([0, *accumulate(n)] for n in (lengths, out_lengths))
    out = samples.new_empty(out_starts[-1])
    groups: dict[int, list[int]] = {}
    for i, rate in enumerate(rates):
        groups.setdefault(rate, []).append(i)
    for rate, members in groups.items():
        if rate == target_rate:
            for i in members:
                out[out_starts[i] : out_starts[i + 1]] = samples[starts[i] : starts[i + 1]]
            continue
        used = plan(rate, target_rate, dtype)
        weights = table(used, dtype)
        clips = torch.tensor([(starts[i], lengths[i], out_starts[i], out_lengths[i]) for i in members])
        workspace = samples.new_empty(threads * ((ROWS + 1) * used.advance + used.span))
        getattr(_native.require(), FUNCTIONS[dtype])(
            out.data_ptr(),
            samples.data_ptr(),
            clips.data_ptr(),
            len(members),
            weights.data_ptr(),
            used.up,
            used.down,
            used.advance,
            used.outputs,
            used.reach,
            used.span,
            workspace.data_ptr(),
            threads,
        )
    return out


@torch.library.register_fake("masktrain::resample", lib=_library)
def _resample_fake(
    samples: Tensor, lengths: Sequence[int], rates: Sequence[int], target_rate: int, dtype: torch.dtype
) -> Tensor:
    return samples.new_empty(sum(_out_lengths(lengths, rates, target_rate)), dtype=dtype)
