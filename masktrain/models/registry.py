# SPDX-License-Identifier: Apache-2.0
"""The models, each found by its config."""

from __future__ import annotations

from masktrain.errors import ConfigError
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae import Mae, MaeConfig
from masktrain.models.mae_ast import MaeAst, MaeAstConfig
from masktrain.models.pretrainer import Pretrainer
from masktrain.models.ssast import Ssast, SsastConfig
from masktrain.types import TokenGrid

ModelConfig = MaeAstConfig | MaeConfig | SsastConfig
"""The config of any model: the type of a recipe's `model` field."""

MODELS: dict[type, type] = {MaeAstConfig: MaeAst, MaeConfig: Mae, SsastConfig: Ssast}


def build(config: ModelConfig, grid: TokenGrid, input_norm: InputNormConfig) -> Pretrainer:
    """Return a new model of the class that the config belongs to."""
    if type(config) not in MODELS:
        allowed = ", ".join(known.__name__ for known in MODELS)
        raise ConfigError(f"model: no model takes a {type(config).__name__}; allowed: {allowed}.")
    model: Pretrainer = MODELS[type(config)](config, grid, input_norm)
    return model
