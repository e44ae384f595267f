# SPDX-License-Identifier: Apache-2.0
"""The public face of resample: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import (
    FULL_FLOATS,
    check_at_least,
    check_counts,
    check_no_gradient,
    check_tensor,
    dtype_names,
)
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import unmeasured
from masktrain.kernels.resample import _native, _triton, reference

IMPLEMENTATIONS = (
    Implementation("triton", _triton.resample, _triton.why_not, unmeasured),
    Implementation("native", _native.resample, _native.why_not),
    Implementation("reference", reference.resample, lambda *_: None),
)


def resample(
    samples: Tensor,
    lengths: tuple[int, ...],
    rates: tuple[int, ...],
    target_rate: int,
    *,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Return packed waveforms at `target_rate`, and their lengths.

    samples: (S,) float32 or float64, clips one after another. lengths: samples of each clip. rates: Hz, one
    per clip. dtype: of the result and of the arithmetic, by default that of samples. float32 sums are off by
    about 1e-7 of a clip's level: below what 16 bits resolve, but visible in a log-mel bin that lies 80 dB
    under its frame. In Triton sums are exact to 2^-30 of the largest sample around, in both dtypes.

    Returns (S',) samples in `dtype` and the lengths ceil(n * target_rate / rate). Sample m of a result lies
    at time m / target_rate: nothing is shifted. A clip counts as silent outside its samples, and its
    neighbours in the packed tensor do not matter. A clip that is at the target rate already keeps its
    samples.

    The filter is a windowed sinc, evaluated at exact rational positions. With the Nyquist frequency of the
    lower of the two rates as 1: flat to 0.0002 dB up to 0.90, -6 dB at 0.95, at most -98 dB from 1.00 on,
    linear phase; a constant stays that constant. Everything is treated as data: no gradient.

    Raises TypeError or ValueError for a wrong dtype, shape, length or rate.
    """
    check_tensor("resample", "samples", samples, FULL_FLOATS, ("S",))
    check_no_gradient("resample", samples=samples)
    check_counts("resample", "lengths", lengths)
    check_counts("resample", "rates", rates, len(lengths))
    for rate in rates:
        check_at_least("resample", "rates", rate, 1)
    check_at_least("resample", "target_rate", target_rate, 1)
    if sum(lengths) != samples.shape[0]:
        raise ValueError(
            f"resample: lengths must add up to the {samples.shape[0]} samples, received {sum(lengths)}."
        )
    dtype = samples.dtype if dtype is None else dtype
    if dtype not in FULL_FLOATS:
        raise TypeError(f"resample: dtype must be {dtype_names(FULL_FLOATS)}, received {dtype!r}.")
    choice = choose("resample", IMPLEMENTATIONS, samples, rates, target_rate, request=implementation)
    return choice.function(samples, lengths, rates, target_rate, dtype=dtype)
