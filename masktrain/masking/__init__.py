# SPDX-License-Identifier: Apache-2.0
"""Masking strategies: which tokens of each clip the encoder sees, as a MaskPlan."""

from masktrain.masking.plan import check_plan, plan_from_ids, visible_count
from masktrain.masking.registry import STRATEGIES, Strategy, strategy
from masktrain.masking.strategies import ChunkMasking, FrameMasking, RandomMasking
from masktrain.masking.time_frequency import TimeFrequencyMasking

__all__ = [
    "STRATEGIES",
    "ChunkMasking",
    "FrameMasking",
    "RandomMasking",
    "Strategy",
    "TimeFrequencyMasking",
    "check_plan",
    "plan_from_ids",
    "strategy",
    "visible_count",
]
