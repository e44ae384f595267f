# SPDX-License-Identifier: Apache-2.0
"""patch_mad against integer sums of patches that are cut clip by clip, the float64 deviation, and published weights."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native, _triton
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.patch_mad import patch_mad
from masktrain.kernels.select_tokens import select_tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = _triton.why_not(torch.zeros(0, device=DEVICE))
NAMES = [
    "reference",
    pytest.param("native", marks=pytest.mark.skipif(_native.cpu() is None, reason="no native library")),
    pytest.param("triton", marks=pytest.mark.skipif(TRITON is not None, reason=str(TRITON))),
]


def problem(
    n_frames: list[int], *, freq: int, patch_freq: int, patch_time: int, order: str, spare_bins: int = 0,
    per_bin: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, odd: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Clips of so many frames, each with the columns that are at least half in it; a share of odd values."""
    rng = np.random.default_rng(seed)
    bins = freq * patch_freq + spare_bins
    values = rng.standard_normal((sum(n_frames), bins)) * 3 - 4
    strange = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30, 0.0, 1e-40, 40.0], values.shape)
    values = np.where(rng.random(values.shape) < odd, strange, values)
    n_tokens = [freq * ((2 * n + patch_time) // (2 * patch_time)) for n in n_frames]
    size = bins if per_bin else 1
    return {
        "frames": torch.from_numpy(values).to(dtype),
        "cu_frames": torch.tensor([0, *accumulate(n_frames)]),
        "cu_tokens": torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32),
        "n_tokens": tuple(n_tokens),
        "mean": torch.from_numpy(rng.uniform(-5, -3, size)).to(dtype),
        "scale": torch.from_numpy(rng.uniform(0.1, 3, size)).to(dtype),
        "freq": freq,
        "patch_freq": patch_freq,
        "patch_time": patch_time,
        "order": order,
    }


def patches_of(p: dict[str, Any]) -> np.ndarray:
    """Every patch in token order, cut by slicing each clip alone: (N, values), normalised in the dtype of the frames."""
    height, width, found = p["patch_freq"], p["patch_time"], []
    with np.errstate(all="ignore"):
        values = (p["frames"].numpy() - p["mean"].numpy()) * p["scale"].numpy()
    bounds = p["cu_frames"].tolist()
    for clip, tokens in enumerate(p["n_tokens"]):
        columns = tokens // p["freq"]
        own = np.zeros((columns * width, values.shape[1]), values.dtype)
        inside = min(len(own), bounds[clip + 1] - bounds[clip])
        own[:inside] = values[bounds[clip] : bounds[clip] + inside]
        places = [(c, r) for c in range(columns) for r in range(p["freq"])]
        if p["order"] == "freq":
            places.sort(key=lambda place: (place[1], place[0]))
        found += [
            own[c * width : (c + 1) * width, r * height : (r + 1) * height].reshape(-1) for c, r in places
        ]
    return np.array(found).reshape(len(found), height * width)


def expected(p: dict[str, Any]) -> np.ndarray:
    """In Python's integers."""
    scores = []
    for patch in patches_of(p):
        kept = np.clip(np.where(np.isnan(patch), 0, patch).astype(np.float64), -16, 16)
        steps = [int(x) for x in np.rint(kept * 1024)]
        n, total = len(steps), sum(steps)
        score = np.float32(sum(abs(n * x - total) for x in steps)) * np.float32(1 / (1024 * n * n))
        scores.append(score)
    return np.array(scores, dtype=np.float32)


def call(p: dict[str, Any], implementation: str) -> Tensor:
    device = DEVICE if implementation == "triton" else "cpu"
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in p.items()}
    with poisoned_memory():
        found = patch_mad(**moved, implementation=implementation)
    assert found.dtype == torch.float32
    return found.cpu()


@st.composite
def problems(draw: st.DrawFn, dtypes: list[torch.dtype]) -> dict[str, Any]:
    return problem(
        draw(st.lists(st.integers(0, 13), min_size=1, max_size=4)),
        freq=draw(st.integers(1, 3)),
        patch_freq=draw(st.sampled_from([1, 2, 3, 16])),
        patch_time=draw(st.integers(1, 4)),
        order=draw(st.sampled_from(["time", "freq"])),
        spare_bins=draw(st.integers(0, 2)),
        per_bin=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**20)),
        odd=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
    )


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_integer_sums(name: str) -> None:
    dtypes = [torch.float32] if name == "triton" else [torch.float32, torch.float64]

    @given(problems(dtypes))
    @settings(max_examples=25 if name == "triton" else 100, deadline=None)
    def check(p: dict[str, Any]) -> None:
        assert call(p, name).numpy().tobytes() == expected(p).tobytes()

    check()


GRIDS = [
    {"freq": 8, "patch_freq": 16, "patch_time": 16, "order": "time"},
    {"freq": 8, "patch_freq": 16, "patch_time": 16, "order": "freq"},
    {"freq": 1, "patch_freq": 128, "patch_time": 2, "order": "time"},
    {"freq": 1, "patch_freq": 80, "patch_time": 51, "order": "time", "spare_bins": 3},
    {"freq": 3, "patch_freq": 5, "patch_time": 7, "order": "freq", "per_bin": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_instruction_set(grid: dict[str, Any], dtype: torch.dtype, level: int) -> None:
    p = problem([100, 7, 0, 333], **grid, dtype=dtype, odd=0.02)
    assert torch.equal(call(p, "native"), call(p, "reference"))


def test_threads(threads: int) -> None:
    if _native.cpu() is None:
        pytest.skip(f"{_native.why_not()}")
    p = problem([512] * 5 + [40], **GRIDS[0])
    assert torch.equal(call(p, "native"), call(p, "reference"))


@pytest.mark.skipif(TRITON is not None, reason=str(TRITON))
@pytest.mark.parametrize("grid", GRIDS)
def test_triton_at_real_sizes(grid: dict[str, Any]) -> None:
    p = problem([100, 7, 0, 133], **grid, odd=0.02)
    assert torch.equal(call(p, "triton"), call(p, "reference"))


@pytest.mark.parametrize("name", NAMES)
def test_within_a_step_of_the_deviation(name: str) -> None:
    p = problem([200, 90], **GRIDS[0])
    p["scale"] = torch.tensor([0.3])
    x = patches_of(p).astype(np.float64)
    truth = np.abs(x - x.mean(1, keepdims=True)).mean(1)
    assert np.abs(call(p, name).double().numpy() - truth).max() < 1 / 1024


@pytest.mark.parametrize("name", NAMES)
def test_the_largest_sum_and_what_is_left_out(name: str) -> None:
    """Half of a patch at each end of the range; a constant patch is 0; NaN is 0; ties are rounded to even."""
    grid: dict[str, Any] = {"freq": 1, "patch_freq": 64, "patch_time": 64, "order": "time"}
    p = problem([64, 64, 64, 64], **grid)
    p |= {"mean": torch.zeros(1), "scale": torch.ones(1)}
    frames = p["frames"].view(4, 64, 64)
    frames[0, :32], frames[0, 32:] = 1e9, -float("inf")
    frames[1] = 3.3
    frames[2] = float("nan")
    frames[3, ::2], frames[3, 1::2] = 2.5 / 1024, 3.5 / 1024
    # 2.5 steps become 2 and 3.5 become 4: one step from their mean.
    assert call(p, name).tolist() == [16.0, 0.0, 0.0, 1 / 1024]


@pytest.mark.parametrize("name", NAMES)
def test_strides_and_no_tokens(name: str) -> None:
    p = problem([40, 24], **GRIDS[0], per_bin=True)
    wide = torch.full((64, 256), float("nan"))
    wide[:, ::2] = p["frames"]
    assert torch.equal(call(p | {"frames": wide[:, ::2]}, name), call(p, "reference"))
    assert call(problem([0, 5], **GRIDS[0]), name).shape == (0,)
    nothing = {"cu_frames": torch.zeros(1, dtype=torch.int64), "cu_tokens": torch.zeros(1, dtype=torch.int32)}
    assert call(p | nothing | {"n_tokens": (), "frames": torch.zeros(0, 128)}, name).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_published_weights_and_their_masks(name: str, golden_dir: Path) -> None:
    """The inputs are multiples of 1 / 64, so nothing is rounded but the weights themselves, which have 1e-12 more."""
    if not (golden_dir / "masking" / "A_dwm.npz").is_file():
        pytest.skip("no masking/A_dwm.npz in the golden data")
    golden = np.load(golden_dir / "masking" / "A_dwm.npz")
    for case, ratios in (("m2d", ("70", "75")), ("wide", ("75", "80"))):
        lms = torch.from_numpy(golden[f"{case}/lms_x64"].astype(np.float32) / 64)
        if name == "triton":
            lms = lms[-2:]
        clips, bins, n_frames = lms.shape
        n_tokens = bins // 16 * (n_frames // 16)
        cu = torch.arange(clips + 1) * n_tokens
        p = {
            "frames": lms.transpose(1, 2).reshape(-1, bins), "cu_frames": torch.arange(clips + 1) * n_frames,
            "cu_tokens": cu.int(), "n_tokens": (n_tokens,) * clips, "mean": torch.zeros(1), "scale": torch.ones(1),
            "freq": bins // 16, "patch_freq": 16, "patch_time": 16, "order": "freq",
        }  # fmt: skip
        scores = call(p, name)
        weights = golden[f"{case}/weight_mad"][-clips:]
        assert np.abs(scores.view(clips, -1).double().numpy() - (weights - 1e-12)).max() < 5e-7
        for ratio in ratios:
            n_visible = int(n_tokens * (1 - int(ratio) / 100))
            draw = (torch.zeros(2, dtype=torch.int64), torch.arange(clips))
            _, masked = select_tokens(
                cu.int(), (n_tokens,) * clips, (n_visible,) * clips, *draw, scores=scores, sample=False
            )
            chosen = torch.zeros(clips * n_tokens, dtype=torch.bool).index_fill_(0, masked.long(), True)
            # Where the last masked and the first visible weight differ by more than rounding.
            clear = golden[f"{case}/determ_mad_r{ratio}_gap"][-clips:] > 1e-6
            published = golden[f"{case}/determ_mad_r{ratio}"][-clips:]
            assert clear.any()
            assert np.array_equal(chosen.view(clips, -1).numpy()[clear], published[clear])


def test_a_traced_step_reads_no_value() -> None:
    p = problem([40, 24], **GRIDS[0])

    def step(frames: Tensor, cu_frames: Tensor, cu_tokens: Tensor) -> Tensor:
        return patch_mad(**p | {"frames": frames, "cu_frames": cu_frames, "cu_tokens": cu_tokens})

    traced = torch.compile(step, backend="aot_eager", fullgraph=True)
    arguments = (p["frames"], p["cu_frames"], p["cu_tokens"])
    assert torch.equal(traced(*arguments), step(*arguments))


def test_opcheck() -> None:
    p = problem([40, 24], **GRIDS[0])
    tensors = (p["frames"], p["cu_frames"], p["cu_tokens"], sum(p["n_tokens"]), p["mean"], p["scale"])
    if _native.cpu() is not None:
        torch.library.opcheck(torch.ops.masktrain.patch_mad.default, (*tensors, 8, 16, 16, True))
    if TRITON is None:
        moved = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in tensors)
        torch.library.opcheck(torch.ops.masktrain.patch_mad_triton.default, (*moved, 8, 16, 16, True))


def test_says_what_it_does_not_serve() -> None:
    p = problem([70], freq=1, patch_freq=64, patch_time=65, order="time")
    for name, why in (("native", _native.why_not()), ("triton", TRITON)):
        if why is None:
            with pytest.raises(KernelUnavailable, match="patches of at most 4096 values, not 4160"):
                call(p, name)
    assert patch_mad(**p).numpy().tobytes() == expected(p).tobytes()
    if TRITON is None:
        with pytest.raises(KernelUnavailable, match="takes float32, not float64"):
            call(problem([70], **GRIDS[0], dtype=torch.float64), "triton")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"frames": torch.zeros(64, 128).half()}, TypeError, "frames must be float32 or float64"),
        (
            {"frames": torch.zeros(64, 128, requires_grad=True)},
            ValueError,
            "frames is data and must not require",
        ),
        ({"cu_tokens": torch.zeros(2, dtype=torch.int32)}, ValueError, r"cu_tokens must have shape \(3,\)"),
        ({"cu_tokens": torch.zeros(3, dtype=torch.int64)}, TypeError, "cu_tokens must be int32"),
        ({"n_tokens": [16, 16]}, TypeError, "n_tokens must be a tuple of int"),
        ({"n_tokens": (16,)}, ValueError, "n_tokens must hold one number for each of 2 clips, received 1"),
        (
            {"n_tokens": (16, 15)},
            ValueError,
            "n_tokens must be multiples of freq = 8, received 15 for clip 1",
        ),
        ({"mean": torch.zeros(3)}, ValueError, r"mean must have shape \(128,\)"),
        ({"order": "row"}, ValueError, "order must be one of 'time', 'freq'"),
        (
            {"patch_freq": 17},
            ValueError,
            "freq \\* patch_freq must be at most the 128 bins, received 8 \\* 17",
        ),
    ],
)
def test_refuses(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        patch_mad(**problem([40, 24], **GRIDS[0]) | change)
