# SPDX-License-Identifier: Apache-2.0
"""The errors a user can cause. Each message says what was wrong, what was received, what is allowed, what to do.

The command line prints them without a traceback and exits with status 2; every other exception is a fault of ours
and exits with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MasktrainError(Exception):
    """Base of all errors that the user can act on."""


class ConfigError(MasktrainError):
    """An unknown name, option or value, or two that do not fit together."""


class DataError(MasktrainError):
    """A manifest or audio file that cannot be used."""


class CheckpointError(MasktrainError):
    """A checkpoint that is absent, damaged, hostile, or of another run."""


class RunError(MasktrainError):
    """A run that must stop: a folder that cannot be written, a loss that is no number."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean 'x'?' for the closest allowed name, or '' when none is close."""
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
