# SPDX-License-Identifier: Apache-2.0
"""The native masked_patch_loss and its gradient: as accurate as the reference, the same bits everywhere."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import check_op
from masktrain.kernels.masked_patch_loss import masked_patch_loss
from masktrain.kernels.masked_patch_loss._native import LARGEST_PATCH

pytestmark = pytest.mark.skipif(_native.cpu() is None, reason="no native library")

# freq, patch_freq, patch_time
GRIDS = [(8, 16, 16), (1, 128, 2), (3, 5, 7), (1, 1, 2), (2, 31, 1), (1, 128, 32)]


def problem(
    grid: tuple[int, int, int], order: str, n_frames: tuple[int, ...] = (50, 1, 0, 33)
) -> dict[str, Any]:
    freq, patch_freq, patch_time = grid
    g = torch.Generator().manual_seed(patch_freq)
    tokens = [freq * (-(-n // patch_time)) for n in n_frames]
    masked = torch.randperm(sum(tokens), generator=g)[: sum(tokens) * 3 // 4].sort().values
    return {
        "pred": torch.randn(len(masked), patch_freq * patch_time, generator=g).requires_grad_(),
        "frames": 3 * torch.randn(sum(n_frames), freq * patch_freq + 1, generator=g) - 4,
        "cu_frames": torch.tensor([0, *accumulate(n_frames)]),
        "cu_tokens": torch.tensor([0, *accumulate(tokens)], dtype=torch.int32),
        "masked": masked.to(torch.int32),
        "mean": torch.randn(freq * patch_freq + 1, generator=g),
        "scale": torch.rand(freq * patch_freq + 1, generator=g) + 0.5,
        "freq": freq,
        "patch_freq": patch_freq,
        "patch_time": patch_time,
        "order": order,
    }


def bound(arguments: dict[str, Any], implementation: str, norm_pix_loss: bool) -> Callable[..., Tensor]:
    rest = {k: v for k, v in arguments.items() if k not in ("pred", "frames", "mean", "scale")}

    def loss(pred: Tensor, frames: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        values = {"frames": frames, "mean": mean, "scale": scale}
        return masked_patch_loss(
            pred, **rest, **values, norm_pix_loss=norm_pix_loss, implementation=implementation
        )

    return loss


def value_and_gradient(arguments: dict[str, Any], norm_pix_loss: bool) -> tuple[Tensor, Tensor]:
    pred = arguments["pred"].detach().requires_grad_()
    loss = masked_patch_loss(
        **arguments | {"pred": pred}, norm_pix_loss=norm_pix_loss, implementation="native"
    )
    return loss.detach(), torch.autograd.grad(3 * loss, pred)[0]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("grid", GRIDS)
def test_as_accurate_as_the_reference(
    grid: tuple[int, int, int], order: str, norm_pix_loss: bool, level: int
) -> None:
    arguments = problem(grid, order)
    inputs = [arguments[k] for k in ("pred", "frames", "mean", "scale")]
    check_op(bound(arguments, "native", norm_pix_loss), bound(arguments, "reference", norm_pix_loss), inputs)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_instruction_set_gives_the_same_bits(
    grid: tuple[int, int, int], norm_pix_loss: bool, level: int
) -> None:
    arguments = problem(grid, "time")
    loss, gradient = value_and_gradient(arguments, norm_pix_loss)
    _native.require().mt_set_cpu_level(0)
    assert all(map(torch.equal, (loss, gradient), value_and_gradient(arguments, norm_pix_loss)))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_float64(grid: tuple[int, int, int], norm_pix_loss: bool, level: int) -> None:
    arguments = problem(grid, "freq")
    arguments |= {k: arguments[k].detach().double() for k in ("pred", "frames", "mean", "scale")}
    pred = arguments["pred"].requires_grad_()
    results = []
    for implementation in ("native", "reference"):
        loss = masked_patch_loss(**arguments, norm_pix_loss=norm_pix_loss, implementation=implementation)
        results.append((loss, *torch.autograd.grad(loss, pred)))
    for native, reference in zip(*results, strict=True):
        torch.testing.assert_close(native, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_threads_do_not_matter(norm_pix_loss: bool, threads: int) -> None:
    arguments = problem((8, 16, 16), "time", (500, 3, 700))
    loss, gradient = value_and_gradient(arguments, norm_pix_loss)
    torch.set_num_threads(1)
    assert all(map(torch.equal, (loss, gradient), value_and_gradient(arguments, norm_pix_loss)))


def test_a_constant_patch_has_a_finite_standardised_target(level: int) -> None:
    arguments = problem((8, 16, 16), "time")
    arguments["frames"] = torch.full_like(arguments["frames"], -11.0)
    arguments |= {"mean": torch.tensor([-4.2677393]), "scale": torch.tensor([0.1094])}
    inputs = [arguments[k] for k in ("pred", "frames", "mean", "scale")]
    check_op(bound(arguments, "native", True), bound(arguments, "reference", True), inputs)


def test_nothing_masked() -> None:
    arguments = problem((8, 16, 16), "time", (0, 0))
    loss, gradient = value_and_gradient(arguments, True)
    assert loss == 0 and gradient.shape == (0, 256)


def test_strided_predictions_and_frames() -> None:
    arguments = problem((3, 5, 7), "freq")
    strided = {
        k: torch.stack([arguments[k].detach(), arguments[k].detach()], 2)[:, :, 0] for k in ("pred", "frames")
    }
    assert not strided["pred"].is_contiguous()
    assert all(
        map(torch.equal, value_and_gradient(arguments, True), value_and_gradient(arguments | strided, True))
    )


def test_nothing_besides_its_inputs_is_saved() -> None:
    arguments = problem((8, 16, 16), "time")
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_patch_loss(**arguments, norm_pix_loss=True, implementation="native")
    held = {v.data_ptr() for v in arguments.values() if isinstance(v, Tensor)}
    assert saved and all(t.data_ptr() in held for t in saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"pred": torch.zeros(3, 4, dtype=torch.bfloat16)},
            "in float32 or in float64, not torch.bfloat16 and torch.float32",
        ),
        (
            {
                "pred": torch.zeros(3, LARGEST_PATCH + 1),
                "frames": torch.zeros(3, LARGEST_PATCH + 1),
                "patch_freq": LARGEST_PATCH + 1,
                "patch_time": 1,
            },
            "at most 4096 values, not 4097",
        ),
    ],
)
def test_what_it_does_not_serve_is_named(change: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "pred": torch.zeros(3, 4),
        "frames": torch.zeros(6, 2),
        "cu_frames": torch.tensor([0, 6]),
        "cu_tokens": torch.tensor([0, 3], dtype=torch.int32),
        "masked": torch.arange(3, dtype=torch.int32),
        "mean": torch.zeros(1),
        "scale": torch.ones(1),
        "freq": 1,
        "patch_freq": 2,
        "patch_time": 2,
        "order": "time",
    } | change
    with pytest.raises(KernelUnavailable, match=words):
        masked_patch_loss(**arguments, implementation="native")
    assert masked_patch_loss(**arguments) == 0


def test_opcheck() -> None:
    *values, order = problem((3, 5, 7), "time").values()
    pred, data = values[0], (*values[1:], order == "time", True)
    torch.library.opcheck(torch.ops.masktrain.masked_patch_loss.default, (pred, *data))
    torch.library.opcheck(
        torch.ops.masktrain.masked_patch_loss_grad.default, (torch.tensor(2.0), pred.detach(), *data)
    )
