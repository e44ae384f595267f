# SPDX-License-Identifier: Apache-2.0
"""The native mask_gather gives the bits of the reference, and reads nothing that does not exist."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.mask_gather import mask_gather

pytestmark = pytest.mark.skipif(_native.cpu() is None, reason="no native library")


def problem(
    n_frames: list[int],
    *,
    bins: int,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
    per_bin: bool,
    seed: int,
) -> dict[str, Any]:
    """Clips of so many frames, each with all columns that it begins; two thirds of their tokens in random order."""
    g = torch.Generator().manual_seed(seed)
    tokens = [freq * (-(-n // patch_time)) for n in n_frames]
    ids = torch.randperm(sum(tokens), generator=g)[: sum(tokens) * 2 // 3 + 1]
    size = bins if per_bin else 1
    return {
        "frames": torch.randn(sum(n_frames), bins, generator=g),
        "cu_frames": torch.tensor([0, *accumulate(n_frames)]),
        "cu_tokens": torch.tensor([0, *accumulate(tokens)], dtype=torch.int32),
        "index": ids.to(torch.int32),
        "mean": torch.randn(size, generator=g),
        "scale": torch.rand(size, generator=g) + 0.5,
        "freq": freq,
        "patch_freq": patch_freq,
        "patch_time": patch_time,
        "order": order,
    }


def both(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        native = mask_gather(**arguments, implementation="native")
    return native, mask_gather(**arguments, implementation="reference")


@given(
    st.lists(st.integers(0, 40), max_size=5),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 3),
    st.sampled_from(["time", "freq"]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_equals_the_reference(
    n_frames: list[int], freq: int, patch_freq: int, patch_time: int, spare: int, order: str, per_bin: bool
) -> None:
    grid = {
        "freq": freq,
        "patch_freq": patch_freq,
        "patch_time": patch_time,
        "bins": freq * patch_freq + spare,
    }
    native, reference = both(problem(n_frames, **grid, order=order, per_bin=per_bin, seed=len(n_frames)))
    assert torch.equal(native, reference)


@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize(("patch_freq", "patch_time"), [(16, 16), (128, 2), (13, 3), (16, 1), (1, 16)])
def test_every_instruction_set(order: str, patch_freq: int, patch_time: int, level: int) -> None:
    grid = {"freq": 128 // patch_freq, "patch_freq": patch_freq, "patch_time": patch_time, "bins": 128}
    arguments = problem([1, 200, 0, 37, 16], **grid, order=order, per_bin=True, seed=1)
    for dtype in (torch.float32, torch.float64):
        native, reference = both(arguments | {k: arguments[k].to(dtype) for k in ("frames", "mean", "scale")})
        assert native.dtype == dtype and torch.equal(native, reference)


def test_threads(threads: int) -> None:
    grid = {"freq": 8, "patch_freq": 16, "patch_time": 16, "bins": 128}
    native, reference = both(problem([1024] * 3 + [5], **grid, order="time", per_bin=False, seed=2))
    assert torch.equal(native, reference)


def test_special_values_and_strides() -> None:
    arguments = problem(
        [9, 30], bins=20, freq=3, patch_freq=5, patch_time=4, order="freq", per_bin=True, seed=3
    )
    arguments["frames"].view(-1)[::7] = float("nan")
    arguments["frames"].view(-1)[::11] = float("inf")
    wide = torch.zeros(39, 60)
    wide[:, ::3] = arguments["frames"]
    strided = arguments | {"frames": wide[:, ::3], "index": arguments["index"].repeat_interleave(2)[::2]}
    assert not strided["frames"].is_contiguous()
    native, reference = both(strided)
    torch.testing.assert_close(native, reference, rtol=0, atol=0, equal_nan=True)


def test_tokens_that_do_not_exist_read_nothing(level: int) -> None:
    arguments = problem(
        [16, 16], bins=16, freq=1, patch_freq=16, patch_time=8, order="time", per_bin=False, seed=4
    )
    arguments["index"] = torch.tensor([-1, 4, 2**31 - 1, -(2**31), 0], dtype=torch.int32)
    out = mask_gather(**arguments, implementation="native")
    assert (out[:4] == 0).all() and (out[4] != 0).any()
    outside = arguments | {"cu_frames": torch.tensor([-8, 2**40, 2**41])}
    assert (mask_gather(**outside, implementation="native") == 0).all()
    no_clips = {"frames": torch.zeros(0, 16), "cu_frames": torch.zeros(1, dtype=torch.int64)}
    no_clips["cu_tokens"] = torch.zeros(1, dtype=torch.int32)
    assert (mask_gather(**arguments | no_clips, implementation="native") == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_others(dtype: torch.dtype) -> None:
    arguments = problem(
        [16], bins=16, freq=1, patch_freq=16, patch_time=8, order="time", per_bin=False, seed=5
    )
    assert mask_gather(**arguments, dtype=dtype).dtype == dtype
    with pytest.raises(KernelUnavailable, match=r"into the same, not torch\.float32 into"):
        mask_gather(**arguments, dtype=dtype, implementation="native")


def test_opcheck() -> None:
    arguments = problem(
        [9, 30], bins=20, freq=3, patch_freq=5, patch_time=4, order="time", per_bin=True, seed=6
    )
    *values, order = arguments.values()
    torch.library.opcheck(torch.ops.masktrain.mask_gather.default, (*values, order == "time"))
