# SPDX-License-Identifier: Apache-2.0
"""The masking strategies by name."""

from __future__ import annotations

from masktrain.errors import ConfigError, nearest
from masktrain.masking.strategies import ChunkMasking, FrameMasking, RandomMasking
from masktrain.masking.time_frequency import TimeFrequencyMasking

Strategy = RandomMasking | ChunkMasking | FrameMasking | TimeFrequencyMasking
"""Any masking strategy: the type of a recipe's `masking` field."""

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls for cls in (RandomMasking, ChunkMasking, FrameMasking, TimeFrequencyMasking)
}


def strategy(name: str) -> type[Strategy]:
    """Return the class of the strategy `name`; raises ConfigError for an unknown name."""
    if name not in STRATEGIES:
        raise ConfigError(
            f"masking: the strategy {name!r} is not known; allowed: {', '.join(STRATEGIES)}."
            f"{nearest(name, STRATEGIES)}"
        )
    return STRATEGIES[name]
