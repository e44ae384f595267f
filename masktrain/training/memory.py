# SPDX-License-Identifier: Apache-2.0
"""The memory that training is expected to take: what the states need exactly, what the activations need as
estimated."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class ExpectedMemory:
    """Bytes. weights: parameters and buffers. gradients, optimizer: of the trainable parameters. activations:
    of one micro-batch, as estimated by the model's owner."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def describe(self) -> str:
        """Return the line of the start block."""
        parts = ("weights", "gradients", "optimizer", "activations")
        listed = ", ".join(f"{name} {human_bytes(getattr(self, name))}" for name in parts)
        return f"{human_bytes(self.total)} expected beside the runtime itself ({listed})"


def expected_memory(model: nn.Module, activations: int) -> ExpectedMemory:
    """Return the memory of training `model` with Adam. activations: bytes saved for backward by one
    micro-batch."""
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return ExpectedMemory(weights, trained, ADAM_MOMENTS * trained, activations)


def human_bytes(count: int) -> str:
    """Return bytes as text, in the largest unit of B, KiB, MiB, GiB, TiB that leaves at least 1."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
