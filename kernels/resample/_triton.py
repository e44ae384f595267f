# SPDX-License-Identifier: Apache-2.0
"""resample in Triton: the products of the reference in exact integers, see kernels/_digits.py.

A program computes 64 outputs of 32 rows. Each row has its own unit, taken from the largest sample that it reads: an
output is off by about 2^-30 of that sample. Not yet measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._checks import FULL_FLOATS
from masktrain.kernels._digits import (
    PLACE,
    add_product,
    digits_of,
    joined,
    split,
    unit_of,
    why_not_digits,
)
from masktrain.kernels._triton import cdiv, jit, on, tl
from masktrain.kernels.resample.reference import Plan, resampled_length, weight_matrix

# Rows and outputs of a program, and samples that it takes at a time.
ROWS, WIDTH, STEP = 32, 64, 32
WARPS, STAGES = 8, 2
# Weights of a ratio: 4 MiB of digits. 11025 to 32000 Hz has a quarter of that.
LARGEST_TABLE = 1 << 20

_library = torch.library.Library("masktrain", "FRAGMENT")
_library.define(
    "resample_triton(Tensor samples, SymInt[] lengths, SymInt[] rates, SymInt target_rate, ScalarType dtype) -> Tensor"
)


def why_not(samples: Tensor, rates: tuple[int, ...], target_rate: int) -> str | None:
    """Return None if Triton brings clips of these rates to `target_rate` on the device of samples, else why not."""
    for rate in set(rates) - {target_rate}:
        used = plan(rate, target_rate)
        weights = used.blocks * used.span * WIDTH
        if weights > LARGEST_TABLE:
            return (
                f"the Triton kernel keeps at most {LARGEST_TABLE} weights for a ratio of rates, and {rate} to "
                f"{target_rate} Hz, in lowest terms {used.down} to {used.up}, needs {weights}"
            )
    return why_not_digits(samples) or _triton.why_not(samples, samples.dtype, allowed=(torch.float32,))


def plan(rate: int, target_rate: int) -> Plan:
    """Return the reference's plan with blocks of WIDTH outputs."""
    whole = Plan.make(rate, target_rate)
    return replace(whole, width=WIDTH, blocks=cdiv(whole.outputs, WIDTH))


@lru_cache(maxsize=32)
def tables(used: Plan, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the (4, blocks, span up to a multiple of STEP, WIDTH) int8 digits of the weights of a plan; (1,) float64,
    their unit; and (blocks,) int32, the first sample that each block reads, relative to the row's."""
    weights = torch.stack([weight_matrix(used, block) for block in range(used.blocks)])
    digits, unit = digits_of(torch.nn.functional.pad(weights, (0, 0, 0, -used.span % STEP)))
    firsts = torch.tensor([used.first(block) for block in range(used.blocks)], dtype=torch.int32)
    return digits.to(device), torch.tensor([unit * PLACE], dtype=torch.float64).to(device), firsts.to(device)


@jit(do_not_specialize=["n_rows", "plane"])
def resample_kernel(
    out_ptr: tl.tensor,
    samples_ptr: tl.tensor,
    clip_of_row_ptr: tl.tensor,
    clips_ptr: tl.tensor,
    digits_ptr: tl.tensor,
    unit_ptr: tl.tensor,
    firsts_ptr: tl.tensor,
    n_rows: tl.tensor,
    plane: tl.tensor,
    SPAN: tl.constexpr,
    ADVANCE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Program (i, q): outputs WIDTH q ... of rows ROWS i ... .

    A clip's five numbers: its first sample, its samples, its first output, its outputs, its first row.
    """
    block = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    clip = tl.load(clip_of_row_ptr + row, mask=exists, other=0) * 5
    length = tl.where(exists, tl.load(clips_ptr + clip + 1), 0).to(tl.int32)
    row = row - tl.load(clips_ptr + clip + 4).to(tl.int32)
    # position in the clip of the first sample that is read
    first = row * ADVANCE + tl.load(firsts_ptr + block)
    source = samples_ptr + tl.load(clips_ptr + clip)
    step = tl.arange(0, STEP)

    largest = tl.zeros([ROWS], tl.float32)
    bad = tl.zeros([ROWS], tl.float32)
    for k in range(0, SPAN, STEP):
        place = first[:, None] + (k + step)[None, :]
        x = tl.load(source[:, None] + place, mask=(place >= 0) & (place < length[:, None]), other=0.0)
        # 0, or NaN where a value is not finite: then the row is NaN
        bad += tl.sum(x - x, 1)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    unit = unit_of(largest)

    s0 = tl.zeros([ROWS, WIDTH], tl.int32)
    s1 = tl.zeros([ROWS, WIDTH], tl.int32)
    s2 = tl.zeros([ROWS, WIDTH], tl.int32)
    s3 = tl.zeros([ROWS, WIDTH], tl.int32)
    s4 = tl.zeros([ROWS, WIDTH], tl.int32)
    column = tl.arange(0, WIDTH)
    for k in range(0, SPAN, STEP):
        place = first[:, None] + (k + step)[None, :]
        x = tl.load(source[:, None] + place, mask=(place >= 0) & (place < length[:, None]), other=0.0)
        x = tl.where(bad[:, None] == 0, x / unit[:, None], 0.0)
        a0, a1, a2, a3 = split(x.to(tl.int32))
        weights = digits_ptr + (block * SPAN + k + step)[:, None] * WIDTH + column[None, :]
        s0, s1, s2, s3, s4 = add_product(s0, s1, s2, s3, s4, a0, a1, a2, a3, weights, plane)

    scale = (unit + bad).to(tl.float64) * tl.load(unit_ptr)
    value = joined(s0, s1, s2, s3, s4).to(tl.float64) * scale[:, None]
    output = block * WIDTH + column
    place = row[:, None] * OUTPUTS + output[None, :]
    wanted = exists[:, None] & (output < OUTPUTS)[None, :] & (place < tl.load(clips_ptr + clip + 3)[:, None])
    to = out_ptr + tl.load(clips_ptr + clip + 2)[:, None] + place
    tl.store(to, value.to(out_ptr.dtype.element_ty), mask=wanted)


def resample(
    samples: Tensor, lengths: tuple[int, ...], rates: tuple[int, ...], target_rate: int, *, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...]]:
    """See op.py."""
    out = torch.ops.masktrain.resample_triton(samples, lengths, rates, target_rate, dtype)
    return out, _out_lengths(lengths, rates, target_rate)


def _out_lengths(lengths: Sequence[int], rates: Sequence[int], target_rate: int) -> tuple[int, ...]:
    return tuple(resampled_length(n, rate, target_rate) for n, rate in zip(lengths, rates, strict=True))


@torch.library.impl(_library, "resample_triton", "CompositeExplicitAutograd")
def _resample(
    samples: Tensor, lengths: Sequence[int], rates: Sequence[int], target_rate: int, dtype: torch.dtype
) -> Tensor:
    assert dtype in FULL_FLOATS
    samples = samples.contiguous()
    out_lengths = _out_lengths(lengths, rates, target_rate)
    starts, out_starts = ([0, *accumulate(n)] for n in (lengths, out_lengths))
    out = samples.new_empty(out_starts[-1], dtype=dtype)
    groups: dict[int, list[int]] = {}
    for i, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
        if rate == target_rate:
            out[out_starts[i] : out_starts[i + 1]] = samples[starts[i] : starts[i + 1]]
        elif length:
            groups.setdefault(rate, []).append(i)
    for rate, members in groups.items():
        used = plan(rate, target_rate)
        rows = [cdiv(out_lengths[i], used.outputs) for i in members]
        total = sum(rows)
        clips = torch.tensor(
            [
                (starts[i], lengths[i], out_starts[i], out_lengths[i], first, n)
                for i, first, n in zip(members, accumulate((0, *rows[:-1])), rows, strict=True)
            ]
        ).to(samples.device, non_blocking=True)
        clip_of_row = torch.repeat_interleave(clips[:, 5], output_size=total)
        digits, unit, firsts = tables(used, samples.device)
        with on(samples):
            resample_kernel[(cdiv(total, ROWS), used.blocks)](
                out,
                samples,
                clip_of_row,
                clips[:, :5].contiguous(),
                digits,
                unit,
                firsts,
                total,
                digits[0].numel(),
                SPAN=digits.shape[2],
                ADVANCE=used.advance,
                OUTPUTS=used.outputs,
                ROWS=ROWS,
                WIDTH=WIDTH,
                STEP=STEP,
                num_warps=WARPS,
                num_stages=STAGES,
            )
    return out


@torch.library.register_fake("masktrain::resample_triton", lib=_library)
def _resample_fake(
    samples: Tensor, lengths: Sequence[int], rates: Sequence[int], target_rate: int, dtype: torch.dtype
) -> Tensor:
    return samples.new_empty(sum(_out_lengths(lengths, rates, target_rate)), dtype=dtype)
