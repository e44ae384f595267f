# SPDX-License-Identifier: Apache-2.0
"""The public face of log_mel: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._checks import FULL_FLOATS, check_counts, check_no_gradient, check_tensor, dtype_names
from masktrain.kernels._dispatch import Implementation, choose
from masktrain.kernels._triton import unmeasured
from masktrain.kernels.log_mel import _native, _triton, reference
from masktrain.kernels.log_mel.spec import MelSpec, spec_problem

IMPLEMENTATIONS = (
    Implementation("triton", _triton.log_mel, _triton.why_not, unmeasured),
    Implementation("native", _native.log_mel, _native.why_not),
    Implementation("reference", reference.log_mel, lambda *_: None),
)


def log_mel(
    samples: Tensor,
    lengths: tuple[int, ...],
    spec: MelSpec,
    *,
    dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, tuple[int, ...]]:
    """Return the log-mel frames of packed waveforms, packed, and the frames of each clip.

    samples: (S,) float32 or float64 at spec.sample_rate, in [-1, 1], clips one after another. lengths:
    samples of each clip. dtype: of the result, float32 or float64, by default that of samples. Returns (T,
    n_mels) and the lengths spec.frames(n). A clip too short for one frame gives none. Frames do not depend on
    the other clips of the batch: for float32 on the CPU bit for bit.

    float32 results lie within 1e-4 of the float64 ones: everything up to the power spectrum is computed in
    float64 (in Triton, the transform in exact integers), since float32 FFTs miss quiet bins beside loud ones by
    more than 1e-3. Everything is treated as
    data: no gradient.

    Raises TypeError or ValueError for a wrong dtype, shape, length or spec.
    """
    check_tensor("log_mel", "samples", samples, FULL_FLOATS, ("S",))
    check_no_gradient("log_mel", samples=samples)
    check_counts("log_mel", "lengths", lengths)
    if sum(lengths) != samples.shape[0]:
        raise ValueError(
            f"log_mel: lengths must add up to the {samples.shape[0]} samples, received {sum(lengths)}."
        )
    if not isinstance(spec, MelSpec):
        raise TypeError(f"log_mel: spec must be a MelSpec, received {type(spec).__name__}.")
    problem = spec_problem(spec)
    if problem:
        raise ValueError(f"log_mel: spec.{problem}")
    dtype = samples.dtype if dtype is None else dtype
    if dtype not in FULL_FLOATS:
        raise TypeError(f"log_mel: dtype must be {dtype_names(FULL_FLOATS)}, received {dtype!r}.")
    choice = choose("log_mel", IMPLEMENTATIONS, samples, spec, dtype, request=implementation)
    return choice.function(samples, lengths, spec, dtype=dtype)
