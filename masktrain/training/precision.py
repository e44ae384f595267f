# SPDX-License-Identifier: Apache-2.0
"""Which number format a step computes in, and why.

Parameters, optimiser, log-mel, softmax sums and losses stay in float32; the format here is that of the matrix
products, through autocast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from masktrain.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """name: fp32, bf16 or fp16. dtype: of the matrix products. scaled: whether the loss is scaled. reason: why."""

    name: str
    dtype: torch.dtype
    scaled: bool
    reason: str

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the autocast context of one forward pass."""
        return torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32)


def choose(request: str, device: torch.device) -> Precision:
    """Return the precision for `device`; an explicit request that cannot be met is a ConfigError."""
    if request == "fp32":
        return Precision("fp32", torch.float32, False, "asked for")
    if device.type == "cpu":
        if request == "fp16":
            raise ConfigError(
                "--precision fp16: not on a CPU, where it has no fast products; use fp32 or bf16."
            )
        if request == "bf16":
            return Precision("bf16", torch.bfloat16, False, "asked for")
        return Precision("fp32", torch.float32, False, "the device is a CPU")
    name = torch.cuda.get_device_name(device)
    capability = torch.cuda.get_device_capability(device)
    has_bf16 = capability >= (8, 0)
    if request == "bf16" and not has_bf16:
        raise ConfigError(
            f"--precision bf16: {name} (sm_{capability[0]}{capability[1]}) has none; use fp16 or fp32."
        )
    if request == "bf16" or (request == "auto" and has_bf16):
        return Precision(
            "bf16", torch.bfloat16, False, "asked for" if request == "bf16" else f"{name} has it"
        )
    reason = "asked for" if request == "fp16" else f"{name} has no bf16"
    return Precision("fp16", torch.float16, True, reason)
