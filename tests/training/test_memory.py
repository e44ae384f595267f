# SPDX-License-Identifier: Apache-2.0
"""Expected memory against what the tensors of a training step really take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from masktrain.training import optim
from masktrain.training.memory import expected_memory, human_bytes


def test_states_are_counted_exactly() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Linear(20, 3, dtype=torch.float32))
    model[2].weight.requires_grad_(False)
    optimizer = optim.build(model, optim.OptimConfig(kind="adam", lr=1e-3), 1e-3)
    model(torch.randn(4, 30)).sum().backward()
    optimizer.step()
    expected = expected_memory(model, activations=1000)

    def size(tensors: list[torch.Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    assert expected.weights == size([*model.parameters(), *model.buffers()])
    assert expected.gradients == size([p.grad for p in model.parameters() if p.grad is not None])
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert expected.optimizer == size(moments)
    assert expected.total == expected.weights + expected.gradients + expected.optimizer + 1000
    assert "1000 B" in expected.describe() and human_bytes(expected.total) in expected.describe()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 20, "3.0 MiB"),
        (5 << 30, "5.0 GiB"),
        (1 << 41, "2.0 TiB"),
    ],
)
def test_bytes_as_text(count: int, text: str) -> None:
    assert human_bytes(count) == text
