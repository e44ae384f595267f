# SPDX-License-Identifier: Apache-2.0
"""Where the golden data and the real audio are; tests that need them skip with the reason where they are absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the original projects' code, one folder each."""
    root = Path(os.environ.get("MASKTRAIN_GOLDEN_DIR", REPO.parent / "shared" / "golden"))
    if not root.is_dir():
        pytest.skip(f"no golden data at {root}; set MASKTRAIN_GOLDEN_DIR")
    return root


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """ESC-10 and FSDD: real audio with esc10.csv and fsdd.csv."""
    root = Path(os.environ.get("MASKTRAIN_DATA_DIR", REPO.parent / "shared" / "data"))
    if not (root / "esc10.csv").is_file():
        pytest.skip(f"no real audio at {root}; set MASKTRAIN_DATA_DIR")
    return root
