# SPDX-License-Identifier: Apache-2.0
"""What may look at the model between two steps, and what it says: labelled clips that are no part of the training.

`masktrain.evaluation.monitor` implements it; training knows no evaluation. Nothing of a run depends on a reading: no
checkpoint is chosen by it, and a run with a monitor computes bit for bit what it does without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from masktrain.data.manifest import Manifest
    from masktrain.training.step import Step


@dataclass(frozen=True)
class Reading:
    """step: steps done. kind: "knn" or "linear". metric: "accuracy" or "mAP". value: in [0, 1]. chance: what answers
    that do not look at the clip reach. seconds: what the reading took."""

    step: int
    kind: str
    metric: str
    value: float
    chance: float
    seconds: float

    @property
    def sentence(self) -> str:
        """What the console says of it."""
        return (
            f"{self.kind} probe after {self.step} steps: {self.metric} {100 * self.value:.1f} % "
            f"(chance {100 * self.chance:.1f} %)"
        )

    def row(self, before: float, elapsed: float) -> dict[str, Any]:
        """Return the line of metrics.jsonl. before: seconds of earlier readings. elapsed: of the run so far."""
        return {
            "step": self.step,
            "probe_kind": self.kind,
            "probe_metric": self.metric,
            "probe_value": self.value,
            "probe_chance": self.chance,
            "probe_seconds": self.seconds,
            "probe_share": (before + self.seconds) / elapsed if elapsed > 0 else 0.0,
        }


def short_reading(kind: str, value: float) -> str:
    """Return the field of the progress line."""
    return f"{kind} {100 * value:.1f} %"


class Monitor(Protocol):
    """Reads the model of a step now and then, on the first rank."""

    def describe(self, clips: Manifest, steps: int) -> list[str]:
        """Return what the start block says. clips: of the training. steps: of the run."""
        ...

    def due(self, done: int, steps: int) -> bool:
        """Whether a reading belongs behind `done` of `steps` steps."""
        ...

    def read(self, step: Step, done: int) -> Reading:
        """Return a reading of the model as it is now. Leaves the model, its mode and all random states as they are."""
        ...
