# SPDX-License-Identifier: Apache-2.0
"""Parsing of options with tyro, the same way in every command."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from masktrain.errors import ConfigError

T = TypeVar("T")


def parse(cls: type[T], command: str, arguments: Sequence[str]) -> T:
    """Return the options of `masktrain COMMAND`; tyro prints help or the mistake and exits."""
    return tyro.cli(cls, args=list(arguments), prog=f"masktrain {command}", description=cls.__doc__)


def parse_known(cls: type[T], command: str, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Like `parse`, and return what it does not know."""
    return tyro.cli(
        cls,
        args=list(arguments),
        prog=f"masktrain {command}",
        description=cls.__doc__,
        return_unknown_args=True,
    )


def override(config: T, command: str, arguments: Sequence[str]) -> T:
    """Return the config with dotted overrides (`--masking.mask-ratio 0.8`) applied."""
    if not arguments:
        return config
    return tyro.cli(
        type(config),
        args=list(arguments),
        default=config,
        prog=f"masktrain {command}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def write_json(path: Path | None, report: Any) -> None:
    """Write what a command reports, whole or not at all; nothing where no path was given."""
    if path is None:
        return
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(report, file, indent=2)
            file.write("\n")
        os.replace(file.name, path)
    except OSError as error:
        raise ConfigError(f"--json {path}: cannot be written: {error.strerror}. Name a file in a folder that can be.") from error
