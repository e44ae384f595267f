# SPDX-License-Identifier: Apache-2.0
"""mask_gather against patches cut by slicing each clip, and against the reference projects' patches."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels.mask_gather import mask_gather


def cumulative(lengths: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def all_patches(
    clips: list[Tensor], columns: list[int], mean, scale, freq, patch_freq, patch_time, order
) -> Tensor:
    """Every patch in token order, cut by slicing each clip alone, padded with 0 after normalising."""
    out = []
    for clip, n in zip(clips, columns, strict=True):
        x = torch.zeros(n * patch_time, clip.shape[1], dtype=clip.dtype)
        inside = min(len(clip), len(x))
        x[:inside] = ((clip - mean) * scale)[:inside]
        grid = [
            [
                x[c * patch_time : (c + 1) * patch_time, r * patch_freq : (r + 1) * patch_freq]
                for c in range(n)
            ]
            for r in range(freq)
        ]
        if order == "time":
            out += [grid[r][c].reshape(-1) for c in range(n) for r in range(freq)]
        else:
            out += [grid[r][c].T.reshape(-1) for r in range(freq) for c in range(n)]
    return torch.stack(out) if out else torch.zeros(0, patch_freq * patch_time, dtype=clips[0].dtype)


@st.composite
def cases(draw):
    freq, patch_freq, patch_time = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(0, 13), min_size=1, max_size=4))
    spare_bins = draw(st.integers(0, 2))
    partial = draw(st.sampled_from(["half", "drop"]))
    columns = [
        n // patch_time + (partial == "half" and 2 * (n % patch_time) >= patch_time > 1) for n in lengths
    ]
    order = draw(st.sampled_from(["time", "freq"]))
    per_bin = draw(st.booleans())
    seed = draw(st.integers(0, 2**31))
    return freq, patch_freq, patch_time, lengths, spare_bins, columns, order, per_bin, seed


@given(cases())
@settings(max_examples=150, deadline=None)
def test_equals_slicing_each_clip(case):
    freq, patch_freq, patch_time, lengths, spare_bins, columns, order, per_bin, seed = case
    g = torch.Generator().manual_seed(seed)
    bins = freq * patch_freq + spare_bins
    frames = torch.randn(sum(lengths), bins, dtype=torch.float64, generator=g)
    clips = list(frames.split(lengths))
    size = bins if per_bin else 1
    mean, scale = torch.randn(2, size, dtype=torch.float64, generator=g)
    want = all_patches(clips, columns, mean, scale, freq, patch_freq, patch_time, order)
    index = torch.randperm(len(want), generator=g).to(torch.int32)
    got = mask_gather(
        frames,
        cumulative(lengths, torch.int64),
        cumulative([freq * c for c in columns], torch.int32),
        index,
        mean=mean,
        scale=scale,
        freq=freq,
        patch_freq=patch_freq,
        patch_time=patch_time,
        order=order,
    )
    assert torch.equal(got, want[index.long()])


GRID = {"freq": 2, "patch_freq": 2, "patch_time": 3}


def arguments(dtype: torch.dtype = torch.float32) -> dict:
    """Two clips of 8 and 6 frames: 3 columns (the last one 2 frames long) and 2."""
    g = torch.Generator().manual_seed(0)
    return {
        "frames": torch.randn(14, 4, dtype=dtype, generator=g),
        "cu_frames": torch.tensor([0, 8, 14]),
        "cu_tokens": torch.tensor([0, 6, 10], dtype=torch.int32),
        "index": torch.arange(10, dtype=torch.int32),
        "mean": torch.tensor([0.5], dtype=dtype),
        "scale": torch.tensor([2.0], dtype=dtype),
        "order": "time",
        **GRID,
    }


@pytest.mark.parametrize("order", ["time", "freq"])
def test_frames_of_neighbours_never_leak(order):
    kw = arguments() | {"order": order}
    clean = mask_gather(**kw)
    kw["frames"] = kw["frames"].clone()
    kw["frames"][8:] = float("nan")
    first = mask_gather(**kw | {"index": torch.arange(6, dtype=torch.int32)})
    assert torch.equal(first, clean[:6])
    assert (first == 0).any(), "the third column of clip 0 ends one frame past the clip"
    assert mask_gather(**kw)[6:].isnan().all()


def test_bins_beyond_the_grid_are_not_read():
    kw = arguments()
    poisoned = torch.full((14, 7), float("nan"))
    poisoned[:, :4] = kw["frames"]
    assert torch.equal(mask_gather(**kw | {"frames": poisoned}), mask_gather(**kw))


def test_non_contiguous_inputs():
    kw = arguments()
    wide = torch.full((28, 11), float("nan"))
    wide[::2, 1:9:2] = kw["frames"]
    twice = kw["index"].repeat_interleave(2)
    assert torch.equal(
        mask_gather(**kw | {"frames": wide[::2, 1:9:2], "index": twice[::2]}), mask_gather(**kw)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_dtype_is_one_rounding_of_the_full_result(dtype):
    kw = arguments()
    got = mask_gather(**kw, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, mask_gather(**kw).to(dtype))


def test_float32_error_against_float64():
    kw = arguments(torch.float64)
    low = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kw.items()}
    truth = mask_gather(
        **{k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in low.items()}
    )
    error = (mask_gather(**low).double() - truth).abs().max()
    assert error <= 2 * torch.finfo(torch.float32).eps * truth.abs().max()


def test_empty():
    kw = arguments()
    assert mask_gather(**kw | {"index": kw["index"][:0]}).shape == (0, 6)
    none = {
        "frames": kw["frames"][:0],
        "cu_frames": torch.zeros(1, dtype=torch.int64),
        "cu_tokens": torch.zeros(1, dtype=torch.int32),
        "index": kw["index"][:0],
    }
    assert mask_gather(**kw | none, dtype=torch.bfloat16).shape == (0, 6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"frames": torch.zeros(14, 4, dtype=torch.float16)},
            TypeError,
            "frames must be float32 or float64, received float16",
        ),
        ({"frames": torch.zeros(14)}, ValueError, r"frames must have shape \(T, F\), received \(14,\)"),
        ({"frames": [1.0]}, TypeError, "frames must be a tensor, received list"),
        (
            {"frames": torch.zeros(14, 4, requires_grad=True)},
            ValueError,
            "frames is data and must not require a gradient",
        ),
        (
            {"cu_frames": torch.zeros(0, dtype=torch.int64)},
            ValueError,
            r"cu_frames must have shape \(B\+1,\)",
        ),
        ({"cu_tokens": torch.zeros(2, dtype=torch.int32)}, ValueError, r"cu_tokens must have shape \(3,\)"),
        ({"index": torch.zeros(2, dtype=torch.int64)}, TypeError, "index must be int32, received int64"),
        ({"mean": torch.zeros(3)}, ValueError, r"mean must have shape \(4,\), received \(3,\)"),
        (
            {"scale": torch.zeros(1, dtype=torch.float64)},
            TypeError,
            "scale must be float32, received float64",
        ),
        ({"freq": 3}, ValueError, "freq \\* patch_freq must be at most the 4 bins, received 3 \\* 2"),
        ({"patch_time": 0}, ValueError, "patch_time must be at least 1, received 0"),
        ({"patch_freq": 2.0}, TypeError, "patch_freq must be an int"),
        ({"order": "mel"}, ValueError, "order must be one of 'time', 'freq', received 'mel'"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float16 or bfloat16 or float32 or float64"),
        (
            {"mean": torch.zeros(1, device="meta")},
            ValueError,
            "mean must be on cpu like frames, received meta",
        ),
        ({"implementation": "magic"}, KernelUnavailable, "no implementation 'magic'"),
    ],
)
def test_refuses(change, error, words):
    with pytest.raises(error, match=words):
        mask_gather(**arguments() | change)


@pytest.mark.parametrize("case", ["A_chunk", "A_frame", "A_random"])
def test_mae_ast_patches(golden_dir, case):
    z = np.load(golden_dir / "mae_ast" / f"{case}.npz")
    x, want = torch.from_numpy(z["input"]), torch.from_numpy(z["patches"])
    clips, frames, bins = x.shape
    patch_time, patch_freq = (2, bins) if case == "A_frame" else (16, 16)
    variance, mean = torch.var_mean(x, correction=0)
    got = mask_gather(
        x.flatten(0, 1),
        cumulative([frames] * clips, torch.int64),
        cumulative([want.shape[1]] * clips, torch.int32),
        torch.arange(clips * want.shape[1], dtype=torch.int32),
        mean=mean[None],
        scale=(0.5 / torch.sqrt(variance + 1e-5))[None],
        freq=bins // patch_freq,
        patch_freq=patch_freq,
        patch_time=patch_time,
        order="time",
    )
    torch.testing.assert_close(got, want.flatten(0, 1), atol=1e-5, rtol=0)


def test_msm_mae_patches_are_frequency_major(golden_dir):
    z = np.load(golden_dir / "msm_mae" / "A_msm_mae.npz")
    x, want = torch.from_numpy(z["input"])[:, 0], torch.from_numpy(z["target"])
    clips, bins, frames = x.shape
    got = mask_gather(
        x.mT.flatten(0, 1),
        cumulative([frames] * clips, torch.int64),
        cumulative([want.shape[1]] * clips, torch.int32),
        torch.arange(clips * want.shape[1], dtype=torch.int32),
        mean=torch.zeros(1),
        scale=torch.ones(1),
        freq=bins // 16,
        patch_freq=16,
        patch_time=16,
        order="freq",
    )
    assert torch.equal(got, want.flatten(0, 1))
