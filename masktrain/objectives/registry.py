# SPDX-License-Identifier: Apache-2.0
"""The objectives. One is a frozen config, whose fields are the recipe's under `objective`, with methods that turn
predictions into loss terms: weights, counts, terms, per_bin_mean_terms."""

from __future__ import annotations

import torch
from torch import Tensor

from masktrain.objectives.joint import JointConfig
from masktrain.objectives.reconstruction import ReconstructionConfig
from masktrain.types import LossTerm

Objective = JointConfig | ReconstructionConfig
"""Any objective: the type of a recipe's `objective` field."""


def total(terms: dict[str, LossTerm], global_counts: dict[str, int]) -> Tensor:
    """Return the weighted sum of sum / count, the counts being those of the whole batch: over all
    micro-batches and ranks it adds up to the loss."""
    return torch.stack(
        [term.weight * term.sum / max(1, global_counts[name]) for name, term in terms.items()]
    ).sum()
