# SPDX-License-Identifier: Apache-2.0
"""The optimiser against a float64 transcription of the published update; clipping, groups, the step guard."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from masktrain.errors import ConfigError
from masktrain.training import optim
from masktrain.training.optim import OptimConfig, build, check_updates, clip_grad, updates_made

MAE_AST: dict[str, Any] = {
    "kind": "adam",
    "betas": (0.9, 0.98),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "decay_all": True,
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(37, 53))
        self.kernel = nn.Parameter(torch.randn(3, 5, 2, 2))
        self.vector = nn.Parameter(torch.randn(101))
        self.scalar = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)


def published_adam(
    weights: list[float],
    grads: list[list[float] | None],
    lrs: list[float],
    config: OptimConfig,
    decay: float,
) -> list[float]:
    """The update of one parameter, value by value in Python floats (Kingma & Ba; Loshchilov & Hutter, algorithm 2:
    L2 regularisation in pink, decoupled decay in green)."""
    beta1, beta2 = config.betas
    out, m, v, t = list(weights), [0.0] * len(weights), [0.0] * len(weights), 0
    for grad, lr in zip(grads, lrs, strict=True):
        if grad is None:
            continue
        t += 1
        for i, g in enumerate(grad):
            if config.coupled_decay:
                g = g + decay * out[i]
            else:
                out[i] -= lr * decay * out[i]
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            out[i] -= lr * (m[i] / (1 - beta1**t)) / (math.sqrt(v[i] / (1 - beta2**t)) + config.eps)
    return out


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("decay_all", [True, False])
def test_the_published_update(dtype: torch.dtype, tolerance: float, decay_all: bool, coupled: bool) -> None:
    """Over a changing learning rate, tiny and zero gradients, and a parameter that misses some updates."""
    config = OptimConfig(**{**MAE_AST, "decay_all": decay_all}, coupled_decay=coupled, lr=1.0)
    torch.manual_seed(0)
    model = Model().to(dtype)
    optimizer = build(model, config, 1.0)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().double().reshape(-1).tolist() for name, p in named.items()}
    lrs = [0.001 * (step + 1) for step in range(30)]
    history: dict[str, list[list[float] | None]] = {name: [] for name in named}
    for step, lr in enumerate(lrs):
        for name, parameter in named.items():
            if name == "kernel" and step % 3 == 0:
                parameter.grad = None
                history[name].append(None)
                continue
            grad = torch.randn(parameter.shape, dtype=dtype) * 10.0 ** (-(step % 8))
            grad[torch.rand(parameter.shape) < 0.1] = 0
            parameter.grad = grad
            history[name].append(grad.double().reshape(-1).tolist())
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for name, parameter in named.items():
        decay = config.weight_decay if decay_all or parameter.dim() >= 2 else 0.0
        truth = torch.tensor(
            published_adam(start[name], history[name], lrs, config, decay), dtype=torch.float64
        )
        error = (parameter.detach().double().reshape(-1) - truth).abs().max()
        assert error <= tolerance * max(1.0, float(truth.abs().max())), name
    assert updates_made(optimizer) == 30


def test_same_bits_on_each_run() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        model = Model()
        optimizer = build(model, OptimConfig(**MAE_AST, lr=0.01, clip_norm=1.0), 0.01)
        for _ in range(5):
            for p in model.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            clip_grad(model.parameters(), 1.0)
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_groups() -> None:
    model = Model()
    both = build(model, OptimConfig(kind="adamw", lr=1e-3, weight_decay=0.05), 1e-3).param_groups
    assert [(g["name"], g["weight_decay"], g["param_names"]) for g in both] == [
        ("matrices", 0.05, ["matrix", "kernel"]),
        ("vectors", 0.0, ["vector", "scalar"]),
    ]
    one = build(model, OptimConfig(**MAE_AST, lr=1e-3), 5e-4).param_groups
    assert [(g["name"], g["weight_decay"], g["lr"], g["betas"], g["eps"]) for g in one] == [
        ("all", 0.01, 5e-4, (0.9, 0.98), 1e-6)
    ]
    assert one[0]["param_names"] == ["matrix", "kernel", "vector", "scalar"]
    only_vectors = build(nn.LayerNorm(3), OptimConfig(kind="adamw", lr=1e-3), 1e-3).param_groups
    assert [g["name"] for g in only_vectors] == ["vectors"]
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build(nn.ReLU(), OptimConfig(kind="adam", lr=1e-3), 1e-3)


def test_base_learning_rate() -> None:
    config = OptimConfig(kind="adamw", blr=1.5e-4)
    assert config.peak_lr(2048) == pytest.approx(1.2e-3, rel=1e-15)
    assert OptimConfig(kind="adamw", lr=3e-4).peak_lr(2048) == 3e-4
    assert "lr 0.0012 (blr 0.00015 x 2048 / 256)" in config.describe(2048)
    own = OptimConfig(kind="adamw", blr=1.5e-4, blr_clips=128)
    assert own.peak_lr(512) == pytest.approx(6e-4, rel=1e-15)
    assert "lr 0.0006 (blr 0.00015 x 512 / 128)" in own.describe(512)
    line = OptimConfig(**MAE_AST, lr=1e-4, clip_norm=10.0).describe(32)
    assert line == (
        "adam: lr 0.0001, betas 0.9 0.98, eps 1e-06, decoupled weight decay 0.01 on all parameters, clip 10"
    )
    coupled = OptimConfig(kind="adam", lr=1e-4, weight_decay=5e-7, coupled_decay=True, decay_all=True)
    assert ", coupled weight decay 5e-07 on all parameters, no clipping" in coupled.describe(24)


WRONG: list[dict[str, Any]] = [{}, {"lr": 1e-3, "blr": 1e-3}, {"lr": 0.0}, {"lr": -1.0}, {"blr": math.nan}]
WRONG += [{"lr": math.inf}, {"lr": 1e-3, "eps": 0.0}, {"lr": 1e-3, "weight_decay": -0.1}]
WRONG += [
    {"lr": 1e-3, "weight_decay": math.nan},
    {"lr": 1e-3, "betas": (0.9, 1.0)},
    {"lr": 1e-3, "betas": (-0.1, 0.9)},
]
WRONG += [{"lr": 1e-3, "clip_norm": 0.0}, {"blr": 1e-3, "blr_clips": 0}]


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_wrong_options(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="optim"):
        OptimConfig(kind="adam", **fields)
    with pytest.raises(ConfigError, match="coupled_decay: AdamW"):
        OptimConfig(kind="adamw", lr=1e-3, coupled_decay=True)


# --- clipping ---


def with_grads(*grads: Tensor | None) -> list[Tensor]:
    out = []
    for grad in grads:
        parameter = torch.zeros(
            grad.shape if grad is not None else (2,), dtype=None if grad is None else grad.dtype
        )
        parameter.grad = grad
        out.append(parameter)
    return out


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 32767, 32768, 32769, 100_003]), min_size=1, max_size=4),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    max_norm=st.sampled_from([1e-3, 1.0, 300.0, 1e9]),
    seed=st.integers(0, 1000),
)
def test_clipping_in_float64(sizes: list[int], scale: float, max_norm: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(n, generator=generator, dtype=torch.float64) * scale for n in sizes]
    parameters = with_grads(*[g.clone() for g in grads], None)
    truth = math.sqrt(math.fsum(v * v for g in grads for v in g.tolist()))
    norm = clip_grad(parameters, max_norm)
    assert norm.dtype == torch.float64 and norm.shape == ()
    assert float(norm) == pytest.approx(truth, rel=1e-12)
    factor = min(1.0, max_norm / (truth + 1e-6))
    for parameter, grad in zip(parameters, grads, strict=False):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grad * factor, rtol=1e-12, atol=0)
        if factor == 1.0:
            assert torch.equal(parameter.grad, grad)


def test_clipping_agrees_with_torch() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(50, 30), torch.randn(7)]
    ours, theirs = with_grads(*[g.clone() for g in grads]), with_grads(*[g.clone() for g in grads])
    norm = clip_grad(ours, 0.5)
    expected = nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_norm_of_many_values_is_accurate_and_independent_of_threads() -> None:
    grad = torch.randn(3_000_000, generator=torch.Generator().manual_seed(0))
    truth = float(torch.linalg.vector_norm(grad.double()))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(clip_grad(with_grads(grad.clone()), None))
    finally:
        torch.set_num_threads(threads)
    assert abs(float(found[0]) / truth - 1) < 1e-6
    assert all(torch.equal(found[0], other) for other in found)


def test_measuring_changes_nothing() -> None:
    grad = torch.randn(100)
    parameters = with_grads(grad.clone())
    assert float(clip_grad(parameters, None)) == pytest.approx(float(grad.norm()), rel=1e-6)
    assert torch.equal(parameters[0].grad, grad)  # type: ignore[arg-type]
    assert float(clip_grad(with_grads(None), 1.0)) == 0.0


def test_a_strided_gradient_is_scaled_in_place() -> None:
    grad = torch.randn(6, 5).t()
    parameters = with_grads(grad)
    before = grad.clone()
    norm = clip_grad(parameters, 1.0)
    torch.testing.assert_close(parameters[0].grad, before / norm, rtol=1e-5, atol=1e-6)


def test_a_nan_shows_in_the_norm() -> None:
    grad = torch.ones(100_000)
    grad[77_777] = math.nan
    assert math.isnan(float(clip_grad(with_grads(grad, torch.ones(3)), 1.0)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits_and_the_update_agrees() -> None:
    torch.manual_seed(0)
    here = Model()
    there = Model().cuda()
    there.load_state_dict(here.state_dict())
    config = OptimConfig(**MAE_AST, lr=0.01)
    a, b = build(here, config, 0.01), build(there, config, 0.01)
    for step in range(6):
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            p.grad = torch.randn_like(p) if p.requires_grad else None
            q.grad = p.grad.cuda() if p.grad is not None else None
        if step == 1:
            torch.cuda.set_sync_debug_mode("error")
        try:
            norm = clip_grad(there.parameters(), 1.0)
            b.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(norm.cpu(), clip_grad(here.parameters(), 1.0))
        a.step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-5, atol=1e-6)
    assert updates_made(b) == 6


# --- the guard ---


def test_the_guard_compares_schedule_and_optimiser() -> None:
    model = Model()
    optimizer = build(model, OptimConfig(kind="adam", lr=1e-3), 1e-3)
    assert updates_made(optimizer) == 0
    check_updates(optimizer, 0)
    for step in range(4):
        for name, p in model.named_parameters():
            late = name == "kernel" and step < 2  # under layerdrop some parameters miss updates
            p.grad = torch.ones_like(p) if p.requires_grad and not late else None
        optimizer.step()
    check_updates(optimizer, 4)
    check_updates(optimizer, 5, skipped=1)
    for wrong in (3, 5):
        with pytest.raises(RuntimeError, match="has made 4 updates"):
            check_updates(optimizer, wrong)


def test_fused_update_is_used() -> None:
    for coupled in (False, True):
        config = OptimConfig(kind="adam", lr=1e-3, coupled_decay=coupled)
        assert all(group["fused"] for group in optim.build(Model(), config, 1e-3).param_groups)
