# SPDX-License-Identifier: Apache-2.0
"""The native resample: as accurate as the reference, the same bits everywhere, nothing read outside of a clip."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import assert_accurate, check_op, poisoned_memory
from masktrain.kernels.resample import resample

pytestmark = pytest.mark.skipif(_native.cpu() is None, reason="no native library")

# Periods of 1, 2, 3, 147, 160, 320, 640 and 1280 outputs; longer, shorter, 48 times shorter results.
PAIRS = [
    (48_000, 16_000),
    (8_000, 16_000),
    (16_000, 48_000),
    (48_000, 44_100),
    (44_100, 16_000),
    (44_100, 32_000),
    (11_025, 16_000),
    (11_025, 32_000),
    (48_000, 1_000),
]


def noise(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)).to(dtype)


def one(samples: Tensor, rate: int, target: int, implementation: str = "native") -> Tensor:
    return resample(samples, (len(samples),), (rate,), target, implementation=implementation)[0]


@pytest.mark.parametrize(("rate", "target"), PAIRS)
def test_as_accurate_as_the_reference(rate: int, target: int, level: int) -> None:
    for count in (1, 5000):
        functions = (
            partial(one, rate=rate, target=target, implementation=i) for i in ("native", "reference")
        )
        check_op(*functions, [noise(count)])


@pytest.mark.parametrize(("rate", "target"), PAIRS)
def test_float64(rate: int, target: int, level: int) -> None:
    """Two orders of a sum of at most 6500 products of size 1 in all differ by far less."""
    x = noise(5000, torch.float64)
    native, reference = one(x, rate, target), one(x, rate, target, "reference")
    assert native.dtype == torch.float64 and native.shape == reference.shape
    torch.testing.assert_close(native, reference, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rate", "target"), PAIRS)
def test_every_instruction_set_gives_the_same_bits(
    rate: int, target: int, dtype: torch.dtype, level: int
) -> None:
    x = noise(5000, dtype)
    out = one(x, rate, target)
    _native.require().mt_set_cpu_level(0)
    assert torch.equal(out, one(x, rate, target))


CLIPS = st.lists(
    st.tuples(st.integers(0, 9000), st.sampled_from([1_000, 8_000, 11_025, 16_000, 44_100, 48_000, 192_000])),
    max_size=7,
)


@given(CLIPS, st.sampled_from([16_000, 32_000]), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_ragged_clips(clips: list[tuple[int, int]], target: int, dtype: torch.dtype) -> None:
    lengths, rates = tuple(n for n, _ in clips), tuple(r for _, r in clips)
    x = noise(sum(lengths))
    with poisoned_memory():
        out, out_lengths = resample(x, lengths, rates, target, dtype=dtype, implementation="native")
    plain, plain_lengths = resample(x, lengths, rates, target, dtype=dtype, implementation="reference")
    truth, _ = resample(x.double(), lengths, rates, target, implementation="reference")
    assert out_lengths == plain_lengths and out.dtype == plain.dtype == dtype
    if dtype == torch.float32:
        assert_accurate(out, plain, truth)
    else:
        torch.testing.assert_close(out, truth, rtol=0, atol=1e-13)
    alone = [one(piece, r, target) for piece, r in zip(x.to(dtype).split(lengths), rates, strict=True)]
    assert torch.equal(out, torch.cat([torch.empty(0, dtype=dtype), *alone]))


def test_threads(threads: int) -> None:
    lengths, rates = (70_000, 3, 0, 90_001, 50_000), (44_100, 44_100, 44_100, 44_100, 8_000)
    x = noise(sum(lengths))
    out, _ = resample(x, lengths, rates, 16_000, implementation="native")
    torch.set_num_threads(1)
    assert torch.equal(out, resample(x, lengths, rates, 16_000, implementation="native")[0])


@pytest.mark.parametrize(("rate", "target"), PAIRS)
def test_neighbours_do_not_leak(rate: int, target: int, level: int) -> None:
    """Not even as 0 times NaN."""
    bad, x = torch.full((500,), math.nan), noise(700)
    out, lengths = resample(
        torch.cat([bad, x, bad]), (500, 700, 500), (rate,) * 3, target, implementation="native"
    )
    assert torch.equal(out.split(lengths)[1], one(x, rate, target))


def test_float64_results_of_float32_samples_and_the_other_way() -> None:
    x = noise(3000)
    clips = ((1000, 1500, 500), (44_100, 16_000, 8_000), 16_000)
    wide, _ = resample(x, *clips, dtype=torch.float64, implementation="native")
    assert torch.equal(wide, resample(x.double(), *clips, implementation="native")[0])
    narrow, _ = resample(x.double(), *clips, dtype=torch.float32, implementation="native")
    assert torch.equal(narrow, resample(x, *clips, implementation="native")[0])


def test_strided_samples() -> None:
    x = noise(4000)
    assert torch.equal(one(x[::2], 8_000, 16_000), one(x[::2].contiguous(), 8_000, 16_000))


def test_a_ratio_of_many_weights_is_left_to_the_reference() -> None:
    x = noise(100)
    with pytest.raises(KernelUnavailable, match="44101 to 16000 Hz, in lowest terms 44101 to 16000, needs"):
        one(x, 44_101, 16_000)
    assert torch.equal(resample(x, (100,), (44_101,), 16_000)[0], one(x, 44_101, 16_000, "reference"))
    assert torch.equal(one(x, 44_101, 44_101), x)


def test_opcheck() -> None:
    arguments = (noise(300), [100, 0, 200], [8_000, 44_100, 16_000], 16_000, torch.float64)
    torch.library.opcheck(torch.ops.masktrain.resample.default, arguments)
