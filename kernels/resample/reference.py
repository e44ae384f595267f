# SPDX-License-Identifier: Apache-2.0
"""Band-limited resampling by a rational ratio, as products of overlapping input rows with small dense
matrices.

The method is textbook polyphase interpolation: output m lies at source position m * down / up, with up / down
the ratio of the rates in lowest terms, and is the sum of the samples around it weighted by a low-pass impulse
response (J. O. Smith, "Digital Audio Resampling", section "Theory of operation"). The positions repeat every
`up` outputs, so the weights of a run of outputs form one matrix that serves all runs of all clips.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from masktrain.kernels._float32 import full_float32

# Half width of the impulse response in samples of the lower rate, its -6 dB point relative to that rate's
# Nyquist frequency, and the shape of its Kaiser window. Kaiser's estimate of the length, (A - 7.95) / (14.36
# df) taps with A = 100 dB, gives a transition band of df = 0.05 of the rate, here 0.90 to 1.00 of Nyquist.
HALF_WIDTH = 64
CUTOFF = 0.95
KAISER_BETA = 0.1102 * (100.0 - 8.7)

OUTPUTS = 64
"""Outputs of one product, roughly: half as many as the filter is wide, so that a third of a matrix is
zeros."""
LARGEST_UP = 96
"""More outputs in a row than this are computed in several products."""
ROWS = 16
"""Rows of a product are a multiple of this: BLAS libraries sum few rows in another order, and a clip would
then depend on its batch."""
CHUNK_ELEMENTS = {"cpu": 1 << 17}
CHUNK_ELEMENTS_ELSEWHERE = 1 << 24
"""Elements of the rows that are gathered at a time: on a CPU what its second-level cache holds."""
CACHE_BYTES = 1 << 27


def resampled_length(length: int, rate: int, target_rate: int) -> int:
    """Return the samples that `length` samples at `rate` become at `target_rate`: ceil(length * target /
    rate)."""
    return -(-length * target_rate // rate)


def resample(
    samples: Tensor, lengths: tuple[int, ...], rates: tuple[int, ...], target_rate: int, *, dtype: torch.dtype
) -> tuple[Tensor, tuple[int, ...]]:
    """See op.py."""
    clips = samples.split(lengths) if lengths else ()
    groups: dict[int, list[int]] = {}
    for i, (length, rate) in enumerate(zip(lengths, rates, strict=True)):
        if length and rate != target_rate:
            groups.setdefault(rate, []).append(i)
    if not groups:
        return samples.to(dtype), lengths
    pieces = list(clips)
    for rate, members in groups.items():
        resampled = _resample_group([clips[i] for i in members], rate, target_rate, dtype)
        for i, piece in zip(members, resampled, strict=True):
            pieces[i] = piece
    out_lengths = tuple(resampled_length(n, r, target_rate) for n, r in zip(lengths, rates, strict=True))
    return torch.cat([piece.to(dtype) for piece in pieces]), out_lengths


@dataclass(frozen=True)
class Plan:
    """How the outputs of one ratio are computed.

    A row stands for `advance` source samples and gives `outputs` outputs (a whole number of periods), in
    `blocks` products of `width` outputs each; what the last block gives beyond `outputs` is dropped. reach:
    samples that the filter extends to either side.
    """

    up: int
    down: int
    advance: int
    outputs: int
    blocks: int
    width: int
    reach: int

    @staticmethod
    def make(rate: int, target_rate: int) -> Plan:
        common = math.gcd(rate, target_rate)
        up, down = target_rate // common, rate // common
        periods = max(1, OUTPUTS // up)
        outputs = periods * up
        blocks = 1 if outputs <= LARGEST_UP else -(-outputs // OUTPUTS)
        width = -(-outputs // blocks)
        reach = math.ceil(HALF_WIDTH * max(up, down) / up)
        return Plan(up, down, periods * down, outputs, blocks, width, reach)

    @property
    def span(self) -> int:
        """Source samples that a block reads."""
        return (self.width - 1) * self.down // self.up + 2 * self.reach + 2

    def first(self, block: int) -> int:
        """Source position, relative to the row's, of the first sample that `block` reads."""
        return block * self.width * self.down // self.up - self.reach


def _resample_group(clips: list[Tensor], rate: int, target_rate: int, dtype: torch.dtype) -> list[Tensor]:
    """Return clips (non-empty, 1-D) of one rate at the target rate, computed in `dtype`.

    The clips are laid out with silence between them, each starting at a whole row, so that the rows of all of
    them are one strided view. The silence is as long as a row reads: no result touches another clip, not even
    with weight 0 (a NaN would pass).
    """
    plan = Plan.make(rate, target_rate)
    last = plan.first(plan.blocks - 1)
    gap = last + plan.span
    slots = [-(-(clip.shape[0] + gap) // plan.advance) for clip in clips]
    rows = -(-sum(slots) // ROWS) * ROWS
    tail = (rows - sum(slots)) * plan.advance + last + plan.reach + plan.span
    silence = clips[0].new_zeros(max(plan.advance + gap, tail))
    laid_out = [silence[: plan.reach]]
    for clip, slot in zip(clips, slots, strict=True):
        laid_out += [clip, silence[: slot * plan.advance - clip.shape[0]]]
    source = torch.cat([*laid_out, silence[:tail]])

    out = source.new_empty(rows, plan.outputs, dtype=dtype)
    chunk = CHUNK_ELEMENTS.get(source.device.type, CHUNK_ELEMENTS_ELSEWHERE)
    step = max(1, chunk // (plan.span * ROWS)) * ROWS
    with full_float32(source.device.type):
        for block in range(plan.blocks):
            weights = _CACHE.get(plan, block, dtype, source.device)
            view = source.as_strided((rows, plan.span), (plan.advance, 1), plan.first(block) + plan.reach)
            column = block * plan.width
            keep = min(plan.width, plan.outputs - column)
            for row in range(0, rows, step):
                product = view[row : row + step].to(dtype) @ weights
                out[row : row + step, column : column + keep] = product[:, :keep]
    flat = out.view(-1)
    pieces = []
    first = 0
    for clip, slot in zip(clips, slots, strict=True):
        start = first * plan.outputs
        pieces.append(flat[start : start + resampled_length(clip.shape[0], rate, target_rate)])
        first += slot
    return pieces


def weight_matrix(plan: Plan, block: int) -> Tensor:
    """Return the (span, width) float64 weights of the samples that `block` reads in each of its outputs.

    Column g is the impulse response around output m = block * width + g, at the distances (p up - m down) /
    up of the samples p; the numerator is an exact integer. Each column is scaled to sum 1, which moves the
    weights by less than the stop band's 1e-5 and keeps a constant constant.
    """
    outputs = block * plan.width + torch.arange(plan.width)
    positions = plan.first(block) + torch.arange(plan.span)
    distance = (positions[:, None] * plan.up - outputs * plan.down).double() / plan.up
    low = min(plan.up, plan.down) / plan.down  # the lower of the two rates, in units of the source rate
    inside = 1 - (distance * (low / HALF_WIDTH)).square()
    window = torch.special.i0(KAISER_BETA * inside.clamp_min(0).sqrt())
    weights = torch.sinc(CUTOFF * low * distance) * window * (inside >= 0)
    return weights / weights.sum(0)


class _WeightCache:
    """The weight matrices in use, least recently used out first, within CACHE_BYTES."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int, int, torch.dtype, torch.device], Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, plan: Plan, block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the weights of `block` on `device`, computed where they are not kept."""
        key = (plan.up, plan.down, block, dtype, device)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        weights = weight_matrix(plan, block).to(dtype).to(device, non_blocking=True)
        with self._lock:
            self._kept[key] = weights
            while self.bytes() > CACHE_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return weights

    def bytes(self) -> int:
        """Bytes of the kept matrices."""
        return sum(w.nbytes for w in self._kept.values())


_CACHE = _WeightCache()
