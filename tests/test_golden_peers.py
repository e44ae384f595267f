# SPDX-License-Identifier: Apache-2.0
"""Which of the projects in the golden data have a recipe that is compared with them; the others are named."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTED = {
    "mae_ast": "tests/models/test_golden_mae_ast.py",
    "maskspec": "tests/models/test_golden_mae.py",
    "msm_mae": "tests/models/test_golden_mae.py",
    "m2d": "tests/models/test_golden_mae.py",
    "audiomae": "tests/models/test_golden_mae.py",
    "ssast": "tests/models/test_golden_ssast.py",
}
# What of these has no recipe yet.
LACKING = {"m2d": "M2D itself"}
FILES = Path(__file__).resolve().parent


def test_peers_with_a_recipe_are_compared(golden_dir: Path) -> None:
    for peer, file in TESTED.items():
        assert (FILES.parent / file).is_file()
        assert list((golden_dir / peer).glob("*.json")), f"no golden case of {peer} in {golden_dir}"


def test_peers_without_a_recipe(golden_dir: Path) -> None:
    peers = sorted(
        p.name
        for p in golden_dir.iterdir()
        if p.is_dir() and list(p.glob("*.state.npz")) and p.name not in TESTED
    )
    peers += [f"{peer} ({what})" for peer, what in LACKING.items() if (golden_dir / peer).is_dir()]
    if peers:
        pytest.skip(f"golden data without a recipe yet: {', '.join(peers)}")
