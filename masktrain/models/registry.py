# SPDX-License-Identifier: Apache-2.0
"""The models by name."""

from __future__ import annotations

from masktrain.errors import ConfigError, nearest
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae_ast import MaeAst, MaeAstConfig
from masktrain.types import TokenGrid

MODELS: dict[str, tuple[type[MaeAstConfig], type[MaeAst]]] = {"mae_ast": (MaeAstConfig, MaeAst)}


def config_class(name: str) -> type[MaeAstConfig]:
    """Return the config class of the model `name`; raises ConfigError for an unknown name."""
    if name not in MODELS:
        raise ConfigError(
            f"model: {name!r} is not known; allowed: {', '.join(MODELS)}.{nearest(name, MODELS)}"
        )
    return MODELS[name][0]


def build(config: MaeAstConfig, grid: TokenGrid, input_norm: InputNormConfig) -> MaeAst:
    """Return a new model of the class that the config belongs to."""
    for config_type, model in MODELS.values():
        if type(config) is config_type:
            return model(config, grid, input_norm)
    raise ConfigError(f"model: no model takes a {type(config).__name__}; allowed: {', '.join(MODELS)}.")
