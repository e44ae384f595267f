# SPDX-License-Identifier: Apache-2.0
"""Hints: how much of an informed mask is given back to chance, over the run, and the exchange that does it.

At hint ratio 1 a mask is plainly random, at 0 it is the one that the strategy chose. Dispersion-weighted and
self-guided masking share both the schedule and the exchange (jstgermainsensortech/m2d:m2d/masking.py, patch_m2d.diff).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from masktrain.errors import ConfigError
from masktrain.kernels.select_tokens import select_tokens
from masktrain.masking.strategies import plan_of_hidden
from masktrain.types import MaskPlan, StepKey, TokenLayout

# Far above any draw of a step, each of which takes the streams 2 * draw and 2 * draw + 1 above it.
_STREAMS = 1 << 30
# An epoch begins a little before the number that stands for it, which is rounded.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class HintConfig:
    """The hint ratio over a run: 1 before the start epoch, then 1 - (epoch / epochs)^gamma, constant within an epoch.

    gamma: above 0; a large one stays near random for most of the run. start_epoch: epochs of plain random masks at the
    start, from 0 to `epochs`. epochs: those of the published run; a run of any other length has as many equal parts.
    abs_hint_ratio: one ratio in [0, 1] for the whole run in place of the schedule.
    """

    gamma: float = 2.0
    start_epoch: int = 50
    epochs: int = 300
    abs_hint_ratio: float | None = None

    def __post_init__(self) -> None:
        if not _number(self.gamma) or not 0 < self.gamma < float("inf"):
            raise ConfigError(
                f"masking.hint.gamma: the exponent must be above 0, received {self.gamma!r}. The default is 2."
            )
        check_epochs("masking.hint.", self.start_epoch, self.epochs)
        if self.abs_hint_ratio is not None and not (
            _number(self.abs_hint_ratio) and 0 <= self.abs_hint_ratio <= 1
        ):
            raise ConfigError(
                f"masking.hint.abs_hint_ratio: a share from 0 (the chosen mask) to 1 (random), or none for the "
                f"schedule; received {self.abs_hint_ratio!r}."
            )

    def ratio(self, progress: float) -> float:
        """Return the hint ratio in [0, 1] when the share `progress` in [0, 1] of the run lies behind."""
        if self.abs_hint_ratio is not None:
            return float(self.abs_hint_ratio)
        epoch = epoch_of(progress, self.epochs)
        if epoch < self.start_epoch:
            return 1.0
        return 1.0 - (epoch / self.epochs) ** self.gamma


def epoch_of(progress: float, epochs: int) -> int:
    """Return in which of `epochs` equal parts of the run, counted from 0, the share `progress` in [0, 1] lies."""
    return min(int(progress * epochs + _ROUNDING), epochs - 1)


def check_epochs(prefix: str, start_epoch: object, epochs: object) -> None:
    """Raise ConfigError unless epochs is at least 1 and start_epoch lies in 0 ... epochs. prefix: of their names."""
    if type(epochs) is not int or epochs < 1:
        raise ConfigError(f"{prefix}epochs: a whole number of at least 1, received {epochs!r}.")
    if type(start_epoch) is not int or not 0 <= start_epoch <= epochs:
        raise ConfigError(
            f"{prefix}start_epoch: a whole number from 0 to {prefix}epochs, which is {epochs}; "
            f"received {start_epoch!r}."
        )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def exchange(layout: TokenLayout, key: StepKey, draw: int, masked_first: MaskPlan, ratio: float) -> MaskPlan:
    """Return `masked_first` with the share `ratio` in [0, 1] of its masked tokens drawn anew.

    Of a clip's M masked tokens, M - h stay, chosen uniformly, h = int(M * ratio); then h are masked, chosen uniformly
    from all others of the clip, those that were just revealed among them. Counts do not change. With h = 0 for all
    clips the plan itself is returned.
    """
    exchanged = tuple(int(m * ratio) for m in masked_first.n_masked)
    if not any(exchanged):
        return masked_first
    total, stream = sum(layout.lengths), _STREAMS + 2 * draw
    # What is drawn from first is class 0: here the masked tokens.
    shown = torch.ones(total, dtype=torch.uint8, device=layout.cu_tokens.device)
    shown[masked_first.masked] = 0
    kept, _ = select_tokens(
        layout.cu_tokens,
        layout.lengths,
        tuple(m - h for m, h in zip(masked_first.n_masked, exchanged, strict=True)),
        key.counter,
        layout.clip_ids,
        classes=shown,
        stream=stream,
    )
    fixed = torch.zeros_like(shown)
    fixed[kept] = 1
    return plan_of_hidden(layout, key, fixed, masked_first.n_visible, stream + 1)
