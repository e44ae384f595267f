# SPDX-License-Identifier: Apache-2.0
"""The masking strategies by name."""

from __future__ import annotations

from masktrain.errors import ConfigError, nearest
from masktrain.masking.axes import FrequencyMasking, TimeMasking
from masktrain.masking.dispersion import DispersionMasking
from masktrain.masking.inverse_block import InverseBlockMasking
from masktrain.masking.patch_drop import PatchDropMasking
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.masking.strategies import ChunkMasking, FrameMasking, RandomMasking
from masktrain.masking.time_frequency import TimeFrequencyMasking

Strategy = (
    RandomMasking
    | FrameMasking
    | ChunkMasking
    | TimeMasking
    | FrequencyMasking
    | TimeFrequencyMasking
    | InverseBlockMasking
    | DispersionMasking
    | SelfGuidedMasking
    | PatchDropMasking
)
"""Any masking strategy: the type of a recipe's `masking` field."""

STRATEGIES: dict[str, type[Strategy]] = {
    cls.name: cls
    for cls in (
        RandomMasking,
        FrameMasking,
        ChunkMasking,
        TimeMasking,
        FrequencyMasking,
        TimeFrequencyMasking,
        InverseBlockMasking,
        DispersionMasking,
        SelfGuidedMasking,
        PatchDropMasking,
    )
}


def strategy(name: str) -> type[Strategy]:
    """Return the class of the strategy `name`; raises ConfigError for an unknown name."""
    if name not in STRATEGIES:
        raise ConfigError(
            f"masking: the strategy {name!r} is not known; allowed: {', '.join(STRATEGIES)}."
            f"{nearest(name, STRATEGIES)}"
        )
    return STRATEGIES[name]
