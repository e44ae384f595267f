# SPDX-License-Identifier: Apache-2.0
"""Sums of products in Triton that are far more exact than float32, and need no float64 units: on integer tensor cores.

Signals have a dynamic range that float32 sums do not hold, and float64 runs at 1/64 of the rate of float32 on many
GPUs. So both factors become integers of four digits in base 256, each in [-128, 127]: products of digits and their sums
fit 32 bits, and int8 is what tensor cores multiply fastest (K. Ozaki et al., "Error-free transformations of matrix
multiplication", Numerical Algorithms 59, 2012; with integers: H. Ootomo et al., "DGEMM on integer matrix multiplication
unit", 2023). Of the sixteen products of digits the thirteen are taken that reach the upper five of the result's seven
places: four places are not enough for log-mel values. What is lost is about 2^-31 of the largest value times the largest
weight, for each term; the result is the same on every device, and in the interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.kernels._triton import jit, tl

# The oldest GPU for whose tensor cores Triton compiles products of int8.
OLDEST = (8, 0)
DIGITS = 4
LARGEST = 126 * 256 ** (DIGITS - 1)
"""No integer is larger: its first digit is then at most 127."""
PLACE = 256**2
"""What 1 of `joined` stands for, times both units: the fifth place of seven."""


@torch.compiler.assume_constant_result
def why_not_digits(x: Tensor) -> str | None:
    """Return None if the GPU that holds x, if it is on one, multiplies int8 on tensor cores, else why not."""
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < OLDEST:
        return f"the Triton kernel needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer"
    return None


def digits_of(weights: Tensor) -> tuple[Tensor, float]:
    """Return (DIGITS, ...) int8, the highest first, and the unit: weights are their value times the unit.

    weights: float64 on the CPU, not all 0.
    """
    unit = float(weights.abs().max()) / LARGEST
    rest = (weights / unit).round().long()
    found = []
    for _ in range(DIGITS):
        digit = ((rest + 128) & 255) - 128
        found.append(digit.to(torch.int8))
        rest = (rest - digit) >> 8
    return torch.stack(found[::-1]), unit


@jit
def unit_of(largest: tl.tensor) -> tl.tensor:
    """Return the unit of numbers of at most this size, a power of two: as integers they are less than 2^30.

    largest: float32. Numbers below 2^-119 count as 0, beside others or not.
    """
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, 7.888609052210118e-31) * 1.862645149230957e-09  # 2^-100, 2^-29


@jit
def split(number: tl.tensor) -> tl.tensor:
    """Return the four digits of int32 numbers in [-LARGEST, LARGEST], the highest first."""
    d3 = ((number + 128) & 255) - 128
    number = (number - d3) >> 8
    d2 = ((number + 128) & 255) - 128
    number = (number - d2) >> 8
    d1 = ((number + 128) & 255) - 128
    d0 = (number - d1) >> 8
    return d0.to(tl.int8), d1.to(tl.int8), d2.to(tl.int8), d3.to(tl.int8)


@jit
def add_product(
    s0: tl.tensor,
    s1: tl.tensor,
    s2: tl.tensor,
    s3: tl.tensor,
    s4: tl.tensor,
    a0: tl.tensor,
    a1: tl.tensor,
    a2: tl.tensor,
    a3: tl.tensor,
    weights_ptr: tl.tensor,
    plane: tl.tensor,
) -> tl.tensor:
    """Return the sums s0 ... s4, (M, N) int32 by place, plus the product of the digits a0 ... a3 (M, K) with weights.

    weights_ptr: (K, N) pointers to the highest digits; those of the next place lie `plane` values on.
    """
    b0 = tl.load(weights_ptr)
    b1 = tl.load(weights_ptr + plane)
    b2 = tl.load(weights_ptr + 2 * plane)
    b3 = tl.load(weights_ptr + 3 * plane)
    s0 = tl.dot(a0, b0, s0, input_precision="ieee", out_dtype=tl.int32)
    s1 = tl.dot(a0, b1, s1, input_precision="ieee", out_dtype=tl.int32)
    s1 = tl.dot(a1, b0, s1, input_precision="ieee", out_dtype=tl.int32)
    s2 = tl.dot(a0, b2, s2, input_precision="ieee", out_dtype=tl.int32)
    s2 = tl.dot(a1, b1, s2, input_precision="ieee", out_dtype=tl.int32)
    s2 = tl.dot(a2, b0, s2, input_precision="ieee", out_dtype=tl.int32)
    s3 = tl.dot(a0, b3, s3, input_precision="ieee", out_dtype=tl.int32)
    s3 = tl.dot(a1, b2, s3, input_precision="ieee", out_dtype=tl.int32)
    s3 = tl.dot(a2, b1, s3, input_precision="ieee", out_dtype=tl.int32)
    s3 = tl.dot(a3, b0, s3, input_precision="ieee", out_dtype=tl.int32)
    s4 = tl.dot(a1, b3, s4, input_precision="ieee", out_dtype=tl.int32)
    s4 = tl.dot(a2, b2, s4, input_precision="ieee", out_dtype=tl.int32)
    s4 = tl.dot(a3, b1, s4, input_precision="ieee", out_dtype=tl.int32)
    return s0, s1, s2, s3, s4


@jit
def joined(s0: tl.tensor, s1: tl.tensor, s2: tl.tensor, s3: tl.tensor, s4: tl.tensor) -> tl.tensor:
    """Return the sums of `add_product` as one int64: times PLACE and both units it is the sum of products."""
    upper = (s0.to(tl.int64) << 32) + (s1.to(tl.int64) << 24)
    return upper + (s2.to(tl.int64) << 16) + (s3.to(tl.int64) << 8) + s4
