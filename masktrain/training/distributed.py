# SPDX-License-Identifier: Apache-2.0
"""The ranks of a run under torchrun, and the few exchanges between them.

Two channels: gradients go through DistributedDataParallel; small host numbers (counts, lengths, stop requests) go
through a gloo group, so that reading them never waits for a GPU.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from masktrain.errors import ConfigError


@dataclass(frozen=True)
class World:
    """rank and size of the run, the device of this rank, and the host group (None when alone)."""

    rank: int
    size: int
    device: torch.device
    host_group: dist.ProcessGroup | None

    @property
    def first(self) -> bool:
        """Whether this rank writes and speaks."""
        return self.rank == 0

    def sum_host(self, values: list[int]) -> list[int]:
        """Return the sums of host integers over the ranks."""
        return self._reduce_host(values, dist.ReduceOp.SUM)

    def max_host(self, values: list[int]) -> list[int]:
        """Return the maxima of host integers over the ranks."""
        return self._reduce_host(values, dist.ReduceOp.MAX)

    def _reduce_host(self, values: list[int], op: dist.ReduceOp.RedOpType) -> list[int]:
        if self.host_group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=op, group=self.host_group)
        return [int(v) for v in tensor]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a device tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.host_group is not None:
            dist.barrier(group=self.host_group)

    def gather_objects(self, value: object) -> list[object]:
        """Return the value of every rank, on every rank."""
        if self.host_group is None:
            return [value]
        out: list[object] = [None] * self.size
        dist.all_gather_object(out, value, group=self.host_group)
        return out

    def wrap(self, model: nn.Module, *, unused: bool) -> nn.Module:
        """Return the model that sums gradients over the ranks. `unused`: some parameters may get no gradient."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, find_unused_parameters=unused
        )


def no_sync(model: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Return a context in which gradients only add up locally, where `wanted` and the model is distributed."""
    if wanted and isinstance(model, DistributedDataParallel):
        context: AbstractContextManager[None] = model.no_sync()
        return context
    return nullcontext()


def pick_device(request: str) -> torch.device:
    """Return the device that `request` (auto, cpu, cuda, cuda:1) names. Raises ConfigError where there is none."""
    if request == "auto":
        request = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(request)
    except RuntimeError as error:
        raise ConfigError(f"--device: {request!r} is no device; allowed: auto, cpu, cuda, cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: {request!r} is not supported; allowed: auto, cpu, cuda, cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError(
                "--device cuda: this machine shows no CUDA device; `masktrain doctor` says why."
            )
        local = int(os.environ.get("LOCAL_RANK", 0))
        index = device.index if device.index is not None else local
        if index >= count:
            raise ConfigError(
                f"--device: cuda:{index} was asked for; this machine has cuda:0 to cuda:{count - 1}."
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return device


def join(request: str) -> World:
    """Join the run that torchrun's environment describes, or be alone where there is none."""
    device = pick_device(request)
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(
            f"WORLD_SIZE={size!r}: is not a number of ranks; start ranks with torchrun, or unset it."
        )
    if int(size) == 1:
        return World(0, 1, device, None)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return World(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))


def leave() -> None:
    """Leave the run."""
    if dist.is_initialized():
        dist.destroy_process_group()
