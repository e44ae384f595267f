# SPDX-License-Identifier: Apache-2.0
"""The optimiser: Adam with either form of weight decay, its parameter groups, and gradient clipping.

One update of parameter p with gradient g at its update t = 1, 2, ... (Kingma & Ba 2015, algorithm 1;
Loshchilov & Hutter 2019, algorithm 2, with the decay times the learning rate):
  p <- p - lr * weight_decay * p
  m <- beta1 m + (1 - beta1) g        v <- beta2 v + (1 - beta2) g^2
  p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)
fairseq's "adam" is the same update, weight decay included (facebookresearch/fairseq:fairseq/optim/adam.py),
but for eps, which it adds to sqrt(v) before the correction of v: a difference in the first updates only.
With `coupled_decay` the first line is g <- g + weight_decay * p instead (L2 regularisation, as torch.optim.Adam has
it), so that the decay goes through both moments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from masktrain.errors import ConfigError

_PIECE = 32768  # torch's CPU reductions are done by one thread up to this many elements


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam as published, with its clipping."""

    kind: Literal["adam", "adamw"]
    """The publication's name for it; the weight decay of both is as coupled_decay says (fairseq's adam decouples)."""
    lr: float | None = None
    """Peak learning rate; give this or blr."""
    blr: float | None = None
    """Peak learning rate per blr_clips clips: lr = blr * batch_size / blr_clips."""
    blr_clips: int = 256
    """Batch that blr stands for (He et al. 2022, appendix A.1: 256)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Each update takes this times the learning rate off a decayed parameter; see coupled_decay."""
    coupled_decay: bool = False
    """Add weight_decay times the parameter to its gradient instead, as torch.optim.Adam does."""
    decay_all: bool = False
    """Decay every parameter, as fairseq does; otherwise matrices only, not biases, norms and other
    vectors."""
    clip_norm: float | None = None
    """Largest 2-norm of all gradients together; none: not clipped."""

    def __post_init__(self) -> None:
        if (self.lr is None) == (self.blr is None):
            raise ConfigError(
                f"optim: give exactly one of lr and blr; received lr={self.lr} and blr={self.blr}. "
                "To take the other one, set this one to None."
            )
        for name in ("lr", "blr", "eps", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"optim.{name}: must be a number above 0; received {value}.")
        if self.blr_clips < 1:
            raise ConfigError(f"optim.blr_clips: must be at least 1; received {self.blr_clips}.")
        if self.coupled_decay and self.kind == "adamw":
            raise ConfigError(
                "optim.coupled_decay: AdamW is Adam with decoupled weight decay. Take optim.kind adam, or leave "
                "coupled_decay off."
            )
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ConfigError(f"optim.weight_decay: must be at least 0; received {self.weight_decay}.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas: both must lie in [0, 1); received {self.betas}.")

    def peak_lr(self, batch_size: int) -> float:
        """Return the learning rate that lr, or blr at this global batch size, stands for."""
        if self.lr is not None:
            return self.lr
        assert self.blr is not None
        return self.blr * batch_size / self.blr_clips

    def describe(self, batch_size: int) -> str:
        """Return the line of the start block."""
        lr = f"lr {self.peak_lr(batch_size):.4g}"
        if self.blr is not None:
            lr += f" (blr {self.blr:.4g} x {batch_size} / {self.blr_clips})"
        decayed = "all parameters" if self.decay_all else "matrices only"
        form = "coupled" if self.coupled_decay else "decoupled"
        decay = f"{form} weight decay {self.weight_decay:g} on {decayed}" if self.weight_decay else "no decay"
        clip = f"clip {self.clip_norm:g}" if self.clip_norm is not None else "no clipping"
        return (
            f"{self.kind}: {lr}, betas {self.betas[0]:g} {self.betas[1]:g}, eps {self.eps:g}, {decay}, {clip}"
        )


def build(model: nn.Module, config: OptimConfig, lr: float) -> torch.optim.Optimizer:
    """Return the optimiser of the model's trainable parameters, with their names in its groups.

    Groups: "all" under `decay_all`, otherwise "matrices" (two dimensions and more, decayed) and "vectors"
    (not). The fused update is taken on CPU and GPU alike: it reads and writes each value once (on two CPU
    cores a quarter of the time of the others), is elementwise and so gives the same bits on each run, and on
    a GPU waits for nothing.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError("optim: the model has no trainable parameter.")
    if config.decay_all:
        split = [("all", config.weight_decay, named)]
    else:
        split = [
            ("matrices", config.weight_decay, [(name, p) for name, p in named if p.dim() >= 2]),
            ("vectors", 0.0, [(name, p) for name, p in named if p.dim() < 2]),
        ]
    groups: list[dict[str, Any]] = [
        {"name": group, "params": members, "weight_decay": decay}
        for group, decay, members in split
        if members
    ]
    cls = torch.optim.Adam if config.coupled_decay else torch.optim.AdamW
    return cls(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def updates_made(optimizer: torch.optim.Optimizer) -> int:
    """Return how many updates the optimiser has made: the most that any parameter has had (under layerdrop a
    parameter misses some). Waits for the device; for checkpoints and the end of a run."""
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    return int(torch.stack([step.detach().float().reshape(()) for step in steps]).max()) if steps else 0


def check_updates(optimizer: torch.optim.Optimizer, step: int, skipped: int = 0) -> None:
    """Check that the optimiser made as many updates as the schedule has steps behind it.

    `skipped`: steps that loss scaling left out. A difference is a fault of the loop, so it raises
    RuntimeError.
    """
    made = updates_made(optimizer)
    if made != step - skipped:
        raise RuntimeError(
            f"the schedule is at step {step} ({skipped} skipped) but the optimiser has made {made} updates"
        )


def clip_grad(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)) in place and return their 2-norm before it.

    torch's and fairseq's rule. The norm is a () float32 tensor (float64 for float64 gradients) on the
    gradients' device, and the scale is applied there: nothing waits for the device. Parameters without
    gradient are left out; `max_norm` None only measures. On the CPU the squares are summed in pieces of
    32768, one thread each, which makes the norm accurate to 1e-6 (torch's float32 norm of 20 million values
    is off by 1e-3) and independent of the number of threads.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    pieces = [piece for g in grads for piece in g.reshape(-1).split(_PIECE)] if grads[0].is_cpu else grads
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(pieces, 2.0)))
    if max_norm is not None:
        scale = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(grads, scale)
    return norm
