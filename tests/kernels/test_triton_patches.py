# SPDX-License-Identifier: Apache-2.0
"""mask_gather, mask_scatter and masked_patch_loss in Triton against their references, on a GPU or interpreted."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from masktrain.kernels import _triton
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import check_op, poisoned_memory
from masktrain.kernels.mask_gather import mask_gather
from masktrain.kernels.mask_scatter import mask_scatter
from masktrain.kernels.masked_patch_loss import masked_patch_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _triton.why_not(torch.zeros(0, device=DEVICE))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# freq, patch_freq, patch_time, bins: square patches, whole frames, single cells, odd sizes with spare bins.
GRIDS = [(8, 16, 16, 128), (1, 80, 2, 80), (1, 1, 1, 1), (3, 3, 5, 11)]
# Clips without tokens first, between and last; one of one column.
COLUMNS = [0, 4, 0, 1, 3, 0]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def cumulative(lengths: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=DEVICE)


def problem(
    grid: tuple[int, int, int, int], order: str, per_bin: bool, columns: list[int] = COLUMNS
) -> dict[str, Any]:
    """Clips of these columns; the last column of each lacks a frame where it has more than one."""
    freq, patch_freq, patch_time, bins = grid
    lengths = [max(c * patch_time - (patch_time > 1), 0) for c in columns]
    return {
        "frames": randn(sum(lengths), bins),
        "cu_frames": cumulative(lengths, torch.int64),
        "cu_tokens": cumulative([c * freq for c in columns], torch.int32),
        "mean": randn(bins if per_bin else 1, seed=1),
        "scale": randn(1, seed=2).abs() + 0.5,
        "freq": freq,
        "patch_freq": patch_freq,
        "patch_time": patch_time,
        "order": order,
    }


def some_tokens(kw: dict[str, Any], share: float = 1.0) -> Tensor:
    total = int(kw["cu_tokens"][-1])
    return (
        torch.randperm(total, generator=torch.Generator().manual_seed(5))[: int(total * share)]
        .int()
        .to(DEVICE)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gather_is_the_reference_bit_for_bit(
    grid: tuple[int, int, int, int], order: str, dtype: torch.dtype
) -> None:
    for per_bin in (False, True):
        kw = problem(grid, order, per_bin)
        index = some_tokens(kw)
        with poisoned_memory():
            ours = mask_gather(index=index, **kw, dtype=dtype, implementation="triton")
        assert torch.equal(ours, mask_gather(index=index, **kw, dtype=dtype, implementation="reference"))


def test_gather_of_one_token_clips_and_of_a_batch_that_is_no_power_of_two() -> None:
    for clips in (1, 2, 7, 33):
        kw = problem((1, 4, 2, 4), "freq", True, [1] * clips)
        index = some_tokens(kw)
        ours, theirs = (mask_gather(index=index, **kw, implementation=i) for i in ("triton", "reference"))
        assert torch.equal(ours, theirs)


def test_gather_reads_no_neighbour_no_spare_bin_and_any_stride() -> None:
    kw = problem((2, 2, 3, 4), "time", True, [3, 2])
    index = torch.arange(6, dtype=torch.int32, device=DEVICE)
    clean = mask_gather(index=index, **kw, implementation="triton")
    wide = torch.full((2 * len(kw["frames"]), 13), torch.nan, device=DEVICE)
    end = int(kw["cu_frames"][1])
    wide[: 2 * end : 2, 1:9:2] = kw["frames"][:end]
    strided = kw | {"frames": wide[::2, 1:9:2], "mean": kw["mean"].repeat_interleave(2)[::2]}
    twice = index.repeat_interleave(2)[::2]
    assert torch.equal(mask_gather(index=twice, **strided, implementation="triton"), clean)
    assert (clean == 0).any(), "the last column ends one frame past the clip"


def test_gather_of_nothing() -> None:
    kw = problem((2, 2, 3, 4), "time", True)
    none = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    assert mask_gather(index=none, **kw, implementation="triton").shape == (0, 6)
    empty = problem((2, 2, 3, 4), "time", True, [])
    assert mask_gather(index=none, **empty, implementation="triton").shape == (0, 6)


def split(n: int, n_visible: int) -> tuple[Tensor, Tensor]:
    ids = torch.randperm(n, generator=torch.Generator().manual_seed(n)).int()
    return ids[:n_visible].sort().values.to(DEVICE), ids[n_visible:].sort().values.to(DEVICE)


@pytest.mark.parametrize(
    ("dtype", "token_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize(
    ("n_visible", "n_masked", "width"),
    [(3, 5, 1), (4, 0, 9), (0, 4, 9), (30, 100, 70), (2, 3, 1100), (0, 0, 3)],
)
def test_scatter(
    n_visible: int, n_masked: int, width: int, dtype: torch.dtype, token_dtype: torch.dtype
) -> None:
    visible, masked = split(n_visible + n_masked, n_visible)
    x = randn(n_visible, width, dtype=dtype).requires_grad_()
    token = randn(width, seed=1, dtype=token_dtype).requires_grad_()

    def run(implementation: str):
        return lambda x, token: mask_scatter(x, token, visible, masked, implementation=implementation)

    check_op(run("triton"), run("reference"), (x, token))
    assert torch.equal(run("triton")(x, token), run("reference")(x, token))


def test_scatter_of_strided_inputs_and_gradients_is_the_same_each_time() -> None:
    visible, masked = split(300, 20)
    x, token, along = randn(40, 20), randn(20, seed=1), randn(10, 300, seed=2)
    results = []
    for implementation in ("triton", "triton", "reference"):
        leaves = x[::2, ::2].detach().requires_grad_(), token[::2].detach().requires_grad_()
        out = mask_scatter(*leaves, visible, masked, implementation=implementation)
        results.append((out.detach(), *torch.autograd.grad(out, leaves, along.mT)))
    for first, again, reference in zip(*results, strict=True):
        assert torch.equal(first, again)
        torch.testing.assert_close(first, reference)


def test_scatter_computes_only_the_gradients_that_are_asked_for() -> None:
    visible, masked = split(9, 4)
    token = randn(5).requires_grad_()
    mask_scatter(randn(4, 5), token, visible, masked, implementation="triton").sum().backward()
    assert torch.equal(token.grad, torch.full((5,), 5.0, device=DEVICE))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("grid", [g for g in GRIDS if g[1] * g[2] > 1], ids=str)
def test_loss(grid: tuple[int, int, int, int], order: str, dtype: torch.dtype, norm_pix_loss: bool) -> None:
    kw = problem(grid, order, True)
    masked = some_tokens(kw, 0.7)
    pred = randn(len(masked), grid[1] * grid[2], seed=4, dtype=dtype).requires_grad_()
    floats = ("frames", "mean", "scale")

    def run(implementation: str):
        def loss(pred: Tensor, *data: Tensor) -> Tensor:
            options = kw | dict(zip(floats, data, strict=True)) | {"implementation": implementation}
            return masked_patch_loss(pred, masked=masked, norm_pix_loss=norm_pix_loss, **options)

        return loss

    check_op(run("triton"), run("reference"), (pred, *(kw[name] for name in floats)))


def loss_problem(rows: int = 5) -> tuple[dict[str, Any], Tensor]:
    kw = problem((2, 3, 4, 6), "time", True, [3, 2])
    return kw | {"masked": some_tokens(kw)[:rows]}, randn(rows, 12, seed=4)


def test_loss_of_strided_predictions_is_the_same_each_time() -> None:
    kw, pred = loss_problem(9)
    wide = torch.full((18, 36), torch.nan, device=DEVICE)
    wide[::2, ::3] = pred
    results = []
    for p in (pred, pred, wide[::2, ::3]):
        leaf = p.detach().requires_grad_()
        loss = masked_patch_loss(leaf, **kw, norm_pix_loss=True, implementation="triton")
        results.append((loss.detach(), torch.autograd.grad(3 * loss, leaf)[0]))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_loss_keeps_clear_of_neighbours_and_of_constant_patches() -> None:
    kw, pred = loss_problem(3)
    kw["masked"] = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE)
    pred.requires_grad_()
    clean = masked_patch_loss(pred, **kw, implementation="triton")
    kw["frames"] = kw["frames"].clone()
    kw["frames"][int(kw["cu_frames"][1]) :] = torch.nan
    assert torch.equal(masked_patch_loss(pred, **kw, implementation="triton"), clean)
    kw["frames"] = torch.full_like(kw["frames"], -3.0)
    loss = masked_patch_loss(pred, **kw, norm_pix_loss=True, implementation="triton")
    assert loss.isfinite() and torch.autograd.grad(loss, pred)[0].isfinite().all()


def test_loss_of_nothing() -> None:
    kw, pred = loss_problem(0)
    pred.requires_grad_()
    loss = masked_patch_loss(pred, **kw, implementation="triton")
    loss.backward()
    assert loss.item() == 0 and pred.grad.shape == (0, 12)


def test_loss_saves_no_target() -> None:
    kw, pred = loss_problem()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_patch_loss(pred.requires_grad_(), **kw, norm_pix_loss=True, implementation="triton")
    held = {t.data_ptr() for t in (pred, *kw.values()) if isinstance(t, Tensor)}
    assert saved and {t.data_ptr() for t in saved} <= held


def test_opcheck() -> None:
    kw, pred = loss_problem()
    names = ("frames", "cu_frames", "cu_tokens", "masked", "mean", "scale")
    data = (*(kw[name] for name in names), kw["freq"], kw["patch_freq"], kw["patch_time"], True)
    ops = torch.ops.masktrain
    torch.library.opcheck(ops.mask_gather_triton.default, (*data, torch.float16))
    torch.library.opcheck(
        ops.masked_patch_loss_triton.default, (pred.requires_grad_(), *data, True), rtol=1e-5, atol=1e-5
    )
    visible, masked = split(9, 4)
    x, token = randn(4, 6).requires_grad_(), randn(6, seed=1).requires_grad_()
    torch.library.opcheck(ops.mask_scatter_triton.default, (x, token, visible, masked), rtol=1e-5, atol=1e-5)


def test_compiles_into_one_graph() -> None:
    kw, pred = loss_problem()
    gather = {name: value for name, value in kw.items() if name != "masked"}
    visible, masked = split(10, 5)
    token = randn(12, seed=1).requires_grad_()

    def step(pred: Tensor, token: Tensor) -> Tensor:
        patches = mask_gather(index=kw["masked"], **gather, implementation="triton")
        rows = mask_scatter(pred * patches, token, visible, masked, implementation="triton")
        return masked_patch_loss(rows[:5], **kw, norm_pix_loss=True, implementation="triton")

    leaves = pred.requires_grad_(), token
    expected = step(*leaves)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*leaves)
    assert torch.equal(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.equal(a, b)


def test_say_what_they_do_not_serve() -> None:
    kw, pred = loss_problem()
    double = kw | {name: kw[name].double() for name in ("frames", "mean", "scale")}
    with pytest.raises(KernelUnavailable, match="takes float32, not float64"):
        masked_patch_loss(pred, **double, implementation="triton")
    del double["masked"]
    with pytest.raises(KernelUnavailable, match="takes float32, not float64"):
        mask_gather(index=kw["masked"], **double, dtype=torch.float32, implementation="triton")
    with pytest.raises(KernelUnavailable, match="takes float16 or bfloat16 or float32, not float64"):
        masked_patch_loss(pred.double(), **kw, implementation="triton")
    visible, masked = split(9, 4)
    with pytest.raises(KernelUnavailable, match="not float64"):
        mask_scatter(randn(4, 6), randn(6).double(), visible, masked, implementation="triton")
    wide = problem((1, 16, 1024, 16), "time", False, [1])
    one = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(KernelUnavailable, match="patches of at most 8192 values, not 16384"):
        masked_patch_loss(randn(1, 16384), masked=one, **wide, implementation="triton")
