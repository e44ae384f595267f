# SPDX-License-Identifier: Apache-2.0
"""Masking strategies: which tokens of each clip the encoder sees, as a MaskPlan."""

from masktrain.masking.axes import FrequencyMasking, TimeMasking
from masktrain.masking.dispersion import DispersionMasking
from masktrain.masking.hint import HintConfig
from masktrain.masking.inverse_block import InverseBlockMasking
from masktrain.masking.patch_drop import PatchDropMasking
from masktrain.masking.plan import check_plan, plan_from_ids, visible_count
from masktrain.masking.registry import STRATEGIES, Strategy, strategy
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.masking.strategies import ChunkMasking, FrameMasking, RandomMasking
from masktrain.masking.time_frequency import TimeFrequencyMasking

__all__ = [
    "STRATEGIES",
    "ChunkMasking",
    "DispersionMasking",
    "FrameMasking",
    "FrequencyMasking",
    "HintConfig",
    "InverseBlockMasking",
    "PatchDropMasking",
    "RandomMasking",
    "SelfGuidedMasking",
    "Strategy",
    "TimeFrequencyMasking",
    "TimeMasking",
    "check_plan",
    "plan_from_ids",
    "strategy",
    "visible_count",
]
