# SPDX-License-Identifier: Apache-2.0
"""masked_patch_loss against explicit targets and the reference projects' losses, and what it saves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from masktrain.kernels.mask_gather import mask_gather
from masktrain.kernels.masked_patch_loss import masked_patch_loss


def problem(order: str = "time", dtype: torch.dtype = torch.float64, per_bin: bool = False) -> dict:
    """Two clips of 9 and 6 frames, the first with a column that is half outside; 5 of 10 tokens masked."""
    g = torch.Generator().manual_seed(3)
    return {
        "frames": torch.randn(15, 6, dtype=dtype, generator=g),
        "cu_frames": torch.tensor([0, 9, 15]),
        "cu_tokens": torch.tensor([0, 6, 10], dtype=torch.int32),
        "masked": torch.tensor([1, 4, 5, 6, 9], dtype=torch.int32),
        "mean": torch.randn(6 if per_bin else 1, dtype=dtype, generator=g),
        "scale": torch.rand(6 if per_bin else 1, dtype=dtype, generator=g) + 0.5,
        "freq": 2,
        "patch_freq": 3,
        "patch_time": 4,
        "order": order,
    }


def prediction(rows: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(4)
    return torch.randn(rows, 12, dtype=dtype, generator=g).requires_grad_()


def truth(pred: Tensor, kw: dict, norm_pix_loss: bool) -> Tensor:
    """The loss of an explicit float64 target, by autograd."""
    upcast = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in kw.items()}
    target = mask_gather(index=upcast.pop("masked"), **upcast)
    if norm_pix_loss:
        centred = target - target.mean(1, keepdim=True)
        variance = centred.square().sum(1, keepdim=True) / (target.shape[1] - 1)
        target = centred / (variance + 1e-6).sqrt()
    return (pred.double() - target).square().sum()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("per_bin", [False, True])
def test_value_and_gradient(order, norm_pix_loss, per_bin):
    kw, pred = problem(order, per_bin=per_bin), prediction()
    got = masked_patch_loss(pred, **kw, norm_pix_loss=norm_pix_loss)
    want = truth(pred, kw, norm_pix_loss)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(got, pred), torch.autograd.grad(want, pred), atol=1e-10, rtol=1e-10
    )
    assert torch.autograd.gradcheck(lambda p: masked_patch_loss(p, **kw, norm_pix_loss=norm_pix_loss), pred)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_low_precision_predictions_are_summed_in_float32(dtype, norm_pix_loss):
    kw = problem(dtype=torch.float32)
    pred = prediction().detach().to(dtype).requires_grad_()
    got = masked_patch_loss(pred, **kw, norm_pix_loss=norm_pix_loss)
    assert got.dtype == torch.float32
    exact = pred.detach().double().requires_grad_()
    want = truth(exact, kw, norm_pix_loss)
    (grad,), (grad_want,) = torch.autograd.grad(got, pred), torch.autograd.grad(want, exact)
    assert abs(got.item() - want.item()) <= 1e-5 * want.item()
    assert grad.dtype == dtype
    assert (grad - grad_want).abs().max() <= max(torch.finfo(dtype).eps, 1e-5) * grad_want.abs().max()


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_compiles_into_one_graph_and_autocast_changes_nothing(norm_pix_loss):
    kw, pred = problem(dtype=torch.float32), prediction(dtype=torch.float32)

    def loss(pred):
        return masked_patch_loss(pred, **kw, norm_pix_loss=norm_pix_loss)

    want = loss(pred)
    (gradient,) = torch.autograd.grad(want, pred)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(pred), want)
        assert torch.equal(torch.autograd.grad(loss(pred), pred)[0], gradient)
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(pred)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, pred)[0], gradient)


def test_frames_of_neighbours_never_leak():
    kw, pred = problem(), prediction(3)
    kw["masked"] = kw["masked"][:3]
    clean = masked_patch_loss(pred, **kw)
    kw["frames"] = kw["frames"].clone()
    kw["frames"][9:] = float("nan")
    poisoned = masked_patch_loss(pred, **kw, norm_pix_loss=False)
    assert torch.equal(poisoned, clean)
    (grad,) = torch.autograd.grad(masked_patch_loss(pred, **kw, norm_pix_loss=True), pred)
    assert grad.isfinite().all()


def test_a_constant_patch_has_a_finite_normalised_target():
    kw, pred = problem(), prediction()
    kw["frames"] = torch.full_like(kw["frames"], -3.0)
    loss = masked_patch_loss(pred, **kw, norm_pix_loss=True)
    assert loss.isfinite()


def test_nothing_masked():
    kw, pred = problem() | {"masked": torch.zeros(0, dtype=torch.int32)}, prediction(0)
    loss = masked_patch_loss(pred, **kw)
    loss.backward()
    assert loss.item() == 0
    assert pred.grad.shape == (0, 12)


def test_non_contiguous_prediction():
    kw, pred = problem(), prediction()
    strided = torch.zeros(10, 36, dtype=torch.float64)
    strided[::2, ::3] = pred.detach()
    view = strided[::2, ::3].requires_grad_()
    loss = masked_patch_loss(view, **kw)
    torch.testing.assert_close(loss, masked_patch_loss(pred, **kw))
    torch.testing.assert_close(
        torch.autograd.grad(loss, view), torch.autograd.grad(masked_patch_loss(pred, **kw), pred)
    )


def test_saves_no_target():
    kw, pred = problem(), prediction()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_patch_loss(pred, **kw, norm_pix_loss=True)
    held = {t.data_ptr() for t in (pred, *[v for v in kw.values() if isinstance(v, Tensor)])}
    assert saved, "no tensor was saved: the test sees nothing"
    assert all(t.data_ptr() in held for t in saved), "something besides the inputs was saved for backward"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"pred": torch.zeros(5, 11)}, ValueError, r"pred must have shape \(5, 12\), received \(5, 11\)"),
        ({"pred": torch.zeros(4, 12)}, ValueError, r"pred must have shape \(5, 12\), received \(4, 12\)"),
        ({"pred": torch.zeros(5, 12, device="meta")}, ValueError, "pred must be on cpu like frames"),
        ({"masked": torch.zeros(5, dtype=torch.int64)}, TypeError, "masked must be int32"),
        (
            {"pred": torch.zeros(5, 1), "patch_freq": 1, "patch_time": 1, "norm_pix_loss": True},
            ValueError,
            "norm_pix_loss needs patches of at least 2 values, received 1",
        ),
    ],
)
def test_refuses(change, error, words):
    with pytest.raises(error, match=words):
        masked_patch_loss(**{"pred": prediction(), **problem()} | change)


def packed(x: Tensor, tokens: int) -> dict:
    """x: (B, T, F), all clips equal."""
    clips, frames, _ = x.shape
    return {
        "frames": x.flatten(0, 1),
        "cu_frames": torch.arange(clips + 1) * frames,
        "cu_tokens": (torch.arange(clips + 1) * tokens).to(torch.int32),
    }


@pytest.mark.parametrize("case", ["A_chunk", "A_frame", "A_random"])
def test_mae_ast_loss(golden_dir, case):
    z = {k: torch.from_numpy(v) for k, v in np.load(golden_dir / "mae_ast" / f"{case}.npz").items()}
    x, pred, tokens = z["input"], z["pred_recon"], z["patches"].shape[1]
    patch_time, patch_freq = (2, x.shape[2]) if case == "A_frame" else (16, 16)
    variance, mean = torch.var_mean(x, correction=0)
    masked = z["masked_ids"].sort(dim=1).values + torch.arange(len(x))[:, None] * tokens
    loss = masked_patch_loss(
        pred.flatten(0, 1),
        **packed(x, tokens),
        masked=masked.flatten().to(torch.int32),
        mean=mean[None],
        scale=(0.5 / torch.sqrt(variance + 1e-5))[None],
        freq=x.shape[2] // patch_freq,
        patch_freq=patch_freq,
        patch_time=patch_time,
        order="time",
    )
    assert abs(loss.item() / pred.numel() - z["loss_recon"].item()) <= 1e-5 + 1e-6 * z["loss_recon"].item()


@pytest.mark.parametrize(("folder", "case"), [("m2d", "A_msm_mae_norm_pix"), ("msm_mae", "A_msm_mae")])
def test_msm_mae_loss_with_and_without_patch_normalisation(golden_dir, folder, case):
    z = {k: torch.from_numpy(v) for k, v in np.load(golden_dir / folder / f"{case}.npz").items()}
    x, tokens = z["input"][:, 0].mT, z["pred"].shape[1]
    hidden = z["mask"].flatten().nonzero()[:, 0]
    pred = z["pred"].flatten(0, 1)[hidden]
    loss = masked_patch_loss(
        pred,
        **packed(x, tokens),
        masked=hidden.to(torch.int32),
        mean=torch.zeros(1),
        scale=torch.ones(1),
        freq=x.shape[2] // 16,
        patch_freq=16,
        patch_time=16,
        order="freq",
        norm_pix_loss=case.endswith("norm_pix"),
    )
    assert abs(loss.item() / pred.numel() - z["loss"].item()) <= 1e-5 + 1e-6 * z["loss"].item()
