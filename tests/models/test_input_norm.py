# SPDX-License-Identifier: Apache-2.0
"""InputNorm against torch's BatchNorm2d, over shards, and its config."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from masktrain.errors import ConfigError
from masktrain.models.input_norm import InputNorm, InputNormConfig

BATCH = InputNormConfig(kind="batch")


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_batch_norm_of_torch(factor: float) -> None:
    """Three training steps and one evaluation, in float64."""
    ours = InputNorm(InputNormConfig(kind="batch", factor=factor), bins=16).double()
    theirs = nn.BatchNorm2d(1, affine=False).double()
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        frames = torch.randn(60, 16, generator=generator, dtype=torch.float64) * (step + 1) - 4
        want = theirs(frames[None, None])[0, 0] * factor
        statistics = ours.statistics(frames)
        mean, scale = ours.affine(statistics)
        assert mean.shape == scale.shape == (1,)
        ours.update(statistics)
        assert torch.allclose((frames - mean) * scale, want, rtol=0, atol=1e-12)
        assert torch.allclose(ours.running_mean, theirs.running_mean, rtol=0, atol=1e-12)
        assert torch.allclose(ours.running_var, theirs.running_var, rtol=0, atol=1e-12)
    mean, scale = ours.affine(None)
    want = theirs.eval()(frames[None, None])[0, 0] * factor
    assert torch.allclose((frames - mean) * scale, want, rtol=0, atol=1e-12)


def test_statistics_add_up() -> None:
    frames = torch.randn(101, 8, generator=torch.Generator().manual_seed(0)) - 4
    norm = InputNorm(BATCH, bins=8)
    whole = norm.statistics(frames)
    parts = torch.stack([norm.statistics(part) for part in frames.split(17)]).sum(0)
    assert whole.dtype == torch.float64 and whole[0] == 808
    assert torch.allclose(whole, parts, rtol=1e-14, atol=0)
    for got, want in zip(norm.affine(parts), norm.affine(whole), strict=True):
        assert got.dtype == torch.float32 and torch.allclose(got, want, rtol=1e-7, atol=0)


def test_far_from_zero_and_silent_input() -> None:
    """No cancellation at an offset of 1e4 deviations; a constant input has variance 0, not below."""
    frames = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    norm = InputNorm(BATCH, bins=8).double()
    mean, scale = norm.affine(norm.statistics(frames))
    assert torch.allclose(((frames - mean) * scale).std(correction=0), torch.tensor(0.5).double(), atol=1e-5)
    constant = torch.full((10, 8), -15.942385)
    mean, scale = norm.affine(norm.statistics(constant))
    assert torch.isfinite(scale).all() and float(scale) <= 0.5 / 1e-5**0.5 + 1e-9


def test_global() -> None:
    """(x - mean) / (2 std), as AST normalises."""
    config = InputNormConfig(kind="global", dataset_mean=-4.2677393, dataset_std=4.5689974)
    norm = InputNorm(config, bins=8)
    mean, scale = norm.affine(None)
    x = torch.tensor([-10.0, 0.0, 3.0])
    assert torch.allclose((x - mean) * scale, (x + 4.2677393) / (2 * 4.5689974))
    assert not norm.uses_batch and not norm.state_dict()


def test_per_bin() -> None:
    """Each bin by its own mean and deviation, but no deviation below the floor; kept with the weights."""
    config = InputNormConfig(kind="per_bin", factor=1.0, std_floor=0.2)
    norm = InputNorm(config, bins=3)
    mean, std = torch.tensor([-1.0, 2.0, -15.0]), torch.tensor([0.5, 4.0, 1e-4])
    norm.set_bins(mean, std)
    frames = torch.tensor([[-1.5, 6.0, -15.25], [0.0, 2.0, -14.0]])
    shift, scale = norm.affine(None)
    want = torch.tensor([[-1.0, 1.0, -1.25], [2.0, 0.0, 5.0]])
    assert torch.allclose((frames - shift) * scale, want, rtol=1e-6, atol=1e-6)
    assert not norm.uses_batch and norm.state_dict().keys() == {"bin_mean", "bin_std"}
    again = InputNorm(config, bins=3)
    again.load_state_dict(norm.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.affine(None), norm.affine(None), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factor": 0.0}, "factor: must be above 0; received 0.0"),
        ({"kind": "global"}, "needs dataset_mean and dataset_std"),
        ({"kind": "global", "dataset_mean": 0.0, "dataset_std": 0.0}, "dataset_std: must be above 0"),
        ({"dataset_mean": 0.0}, "kind 'batch' measures its own, without dataset_mean"),
        ({"kind": "per_bin", "dataset_std": 1.0}, "kind 'per_bin' measures its own, without dataset_mean"),
        ({"std_floor": 0.0}, "std_floor: must be above 0; received 0.0"),
        ({"measured_clips": 0}, "measured_clips: must be at least 1; received 0"),
    ],
)
def test_bad_config(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(BATCH, **change)
