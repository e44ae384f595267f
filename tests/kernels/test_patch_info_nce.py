# SPDX-License-Identifier: Apache-2.0
"""patch_info_nce against a float64 loop over clips and the reference projects' losses, and its memory."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.patch_info_nce import patch_info_nce, reference

COUNTS = [(4, 4, 4), (3, 0, 5, 5, 1), (1,), (7,), (0, 0, 6)]
AXES = ["targets", "predictions"]


def rows(
    counts: tuple[int, ...], dtype: torch.dtype = torch.float64, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(sum(counts))
    pred, target = size * torch.randn(2, sum(counts), 5, dtype=torch.float64, generator=g)
    cu = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    return pred.to(dtype).requires_grad_(), target.to(dtype).requires_grad_(), cu


def truth(pred: Tensor, target: Tensor, counts: tuple[int, ...], axis: str) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for p, t in zip(pred.double().split(counts), target.double().split(counts), strict=True):
        logits = p @ t.T if axis == "targets" else t @ p.T
        total = total - logits.log_softmax(dim=1).diagonal().sum()
    return total


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("limit", [1, 40, 1 << 24])
def test_value_and_gradients(counts, axis, limit, monkeypatch):
    monkeypatch.setattr(reference, "MAX_LOGITS", limit)
    pred, target, cu = rows(counts)
    want = truth(pred, target, counts, axis)
    with poisoned_memory():
        got = patch_info_nce(pred, target, cu, counts, axis=axis)
        gradients = torch.autograd.grad(got, (pred, target))
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        gradients,
        torch.autograd.grad(want, (pred, target)),
        atol=1e-10,
        rtol=1e-10,
    )


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("counts", [(3, 3), (2, 4)])
def test_gradcheck(counts, axis):
    pred, target, cu = rows(counts)
    assert torch.autograd.gradcheck(lambda p, t: patch_info_nce(p, t, cu, counts, axis=axis), (pred, target))


def test_the_two_axes_differ_and_swap_with_the_sides():
    counts = (4, 6)
    pred, target, cu = rows(counts)
    a = patch_info_nce(pred, target, cu, counts, axis="targets")
    b = patch_info_nce(pred, target, cu, counts, axis="predictions")
    assert abs(a.item() - b.item()) > 1e-3
    torch.testing.assert_close(patch_info_nce(target, pred, cu, counts, axis="predictions"), a)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_sums_in_float32(dtype, axis):
    counts = (9, 6, 6)
    pred, target, cu = rows(counts, dtype)
    exact = pred.detach().double().requires_grad_()
    got, want = (
        patch_info_nce(pred, target.detach().float(), cu, counts, axis=axis),
        truth(exact, target, counts, axis),
    )
    assert got.dtype == torch.float32
    assert abs(got.item() - want.item()) <= 1e-5 * abs(want.item())
    (grad,), (grad_want,) = torch.autograd.grad(got, pred), torch.autograd.grad(want, exact)
    assert grad.dtype == dtype
    assert (grad - grad_want).abs().max() <= max(torch.finfo(dtype).eps, 1e-5) * grad_want.abs().max()


@pytest.mark.parametrize("axis", AXES)
def test_autocast_changes_nothing(axis):
    pred, target, cu = rows((6, 6), torch.float32)

    def loss_and_gradient() -> list[Tensor]:
        loss = patch_info_nce(pred, target, cu, (6, 6), axis=axis)
        return [loss, *torch.autograd.grad(loss, (pred, target))]

    plain = loss_and_gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(loss_and_gradient(), plain, strict=True))


@pytest.mark.parametrize("axis", AXES)
def test_compiles_into_one_graph(axis):
    pred, target, cu = rows((6, 6, 4))

    def loss(pred, target, cu):
        return patch_info_nce(pred, target, cu, (6, 6, 4), axis=axis)

    got, want = (
        torch.compile(loss, backend="aot_eager", fullgraph=True)(pred, target, cu),
        loss(pred, target, cu),
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (pred, target)), torch.autograd.grad(want, (pred, target))
    )


@pytest.mark.parametrize("axis", AXES)
def test_large_logits_stay_finite(axis):
    counts = (6, 6)
    pred, target, cu = rows(counts, torch.float32, size=100.0)
    loss = patch_info_nce(pred, target, cu, counts, axis=axis)
    grads = torch.autograd.grad(loss, (pred, target))
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    assert abs(loss.item() - truth(pred, target, counts, axis).item()) <= 1e-5 * abs(loss.item())


def test_clips_do_not_see_each_other():
    counts = (3, 4)
    pred, target, cu = rows(counts)
    (clean,) = torch.autograd.grad(patch_info_nce(pred, target, cu, counts, axis="targets"), pred)
    poisoned = target.detach().clone()
    poisoned[3:] = float("nan")
    (grad,) = torch.autograd.grad(patch_info_nce(pred, poisoned, cu, counts, axis="targets"), pred)
    assert torch.equal(grad[:3], clean[:3])
    assert grad[3:].isnan().all()


def test_saved_memory_is_linear():
    def saved(n: int) -> int:
        numbers = []
        pred, target, cu = rows((n, n))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: numbers.append(t.numel()) or t, lambda t: t):
            patch_info_nce(pred, target, cu, (n, n), axis="targets")
        return sum(numbers)

    assert saved(10) == 20 * (5 + 5 + 1)
    assert saved(160) == 16 * saved(10)


def test_only_the_wanted_gradient_is_computed():
    pred, target, cu = rows((3, 3))
    loss = patch_info_nce(pred, target.detach(), cu, (3, 3), axis="targets")
    (grad,) = torch.autograd.grad(loss, pred)
    assert grad.isfinite().all()


@pytest.mark.parametrize("counts", [(), (0,)])
def test_nothing_masked(counts):
    pred, target, cu = rows(counts)
    loss = patch_info_nce(pred, target, cu, counts, axis="targets")
    loss.backward()
    assert loss.item() == 0
    assert pred.grad.shape == (0, 5)


def test_a_clip_with_one_masked_token_has_no_negatives():
    pred, target, cu = rows((1, 1))
    loss = patch_info_nce(pred, target, cu, (1, 1), axis="targets")
    loss.backward()
    assert loss.item() == 0
    assert (pred.grad == 0).all()


def test_non_contiguous_inputs():
    counts = (3, 4)
    pred, target, cu = rows(counts)
    p = torch.randn(14, 10, dtype=torch.float64)
    p[::2, ::2] = pred.detach()
    view = p[::2, ::2].requires_grad_()
    loss = patch_info_nce(view, target.detach().mT.contiguous().mT, cu, counts, axis="predictions")
    want = patch_info_nce(pred, target, cu, counts, axis="predictions")
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, view), torch.autograd.grad(want, pred))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pred": torch.zeros(5, 3, dtype=torch.int32)}, TypeError, "pred must be float16"),
        ({"target": torch.zeros(5, 4)}, ValueError, r"target must have shape \(5, 3\), received \(5, 4\)"),
        ({"n_masked": (2, 2)}, ValueError, "n_masked must add up to the 5 rows of pred, received 4"),
        ({"n_masked": [2, 3]}, TypeError, "n_masked must be a tuple of int"),
        ({"n_masked": (6, -1)}, ValueError, "n_masked must hold numbers >= 0, received -1"),
        ({"cu_masked": torch.zeros(2, dtype=torch.int32)}, ValueError, r"cu_masked must have shape \(3,\)"),
        ({"axis": "both"}, ValueError, "axis must be one of 'targets', 'predictions', received 'both'"),
        ({"target": torch.zeros(5, 3, device="meta")}, ValueError, "target must be on cpu like pred"),
    ],
)
def test_refuses(change, error, words):
    good = {
        "pred": torch.zeros(5, 3),
        "target": torch.zeros(5, 3),
        "cu_masked": torch.tensor([0, 2, 5], dtype=torch.int32),
        "n_masked": (2, 3),
        "axis": "targets",
    }
    with pytest.raises(error, match=words):
        patch_info_nce(**good | change)


def golden_loss(pred: Tensor, target: Tensor, axis: str) -> float:
    """pred, target: (B, M, P). The mean over tokens."""
    clips, n, _ = pred.shape
    cu = (torch.arange(clips + 1) * n).to(torch.int32)
    return patch_info_nce(pred.flatten(0, 1), target.flatten(0, 1), cu, (n,) * clips, axis=axis).item() / (
        clips * n
    )


@pytest.mark.parametrize("case", ["A_chunk", "A_frame", "A_random"])
def test_mae_ast_runs_over_targets(golden_dir, case):
    z = {k: torch.from_numpy(v) for k, v in np.load(golden_dir / "mae_ast" / f"{case}.npz").items()}
    ids = z["masked_ids"].sort(dim=1).values
    target = z["patches"].gather(1, ids[:, :, None].expand(-1, -1, z["patches"].shape[2]))
    want = z["loss_info_nce"].item()
    assert abs(golden_loss(z["pred_class"], target, "targets") - want) <= 1e-5 + 1e-6 * want


def test_ssast_runs_over_predictions(golden_dir):
    z = {k: torch.from_numpy(v) for k, v in np.load(golden_dir / "ssast" / "A_patch.npz").items()}
    x = z["input"].mT
    grid = x.unflatten(1, (-1, 16)).unflatten(3, (-1, 16))
    patches = grid.permute(0, 1, 3, 2, 4).reshape(len(x), -1, 256)
    target = patches.gather(1, z["mask_ids_mpc"][:, :, None].expand(-1, -1, 256))
    want = z["nce"].item()
    assert abs(golden_loss(z["pred_mpc"], target, "predictions") - want) <= 1e-5 + 1e-6 * want
