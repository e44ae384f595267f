# SPDX-License-Identifier: Apache-2.0
"""`masktrain bench masking`: its rows, table and picture, and what it refuses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

STRATEGIES = {
    "random",
    "inverse_block",
    "dispersion",
    "self_guided_solver",
    "self_guided_fresh",
    "self_guided_early_layer",
    "self_guided_cached",
    "self_guided_published_eigh",
    "self_guided_published_eigh_loop",
    "self_guided_published_pca",
    "inverse_block_published_loop",
    "training_step",
}


def test_rows_table_and_picture(cli: Cli, tmp_path: Path) -> None:
    rows, picture = tmp_path / "rows.json", tmp_path / "masking.png"
    chosen = ("--grids", "5x38", "--batch-sizes", "1,2", "--seconds", "0", "--device", "cpu", "--no-scaling")
    done = cli("bench", "masking", *chosen, "--json", rows, "-o", picture)
    assert done.returncode == 0, done.stderr
    report = json.loads(rows.read_text())
    for clips in (1, 2):
        found = [row for row in report["rows"] if row["clips"] == clips]
        assert {row["strategy"] for row in found} == STRATEGIES and len(found) == len(STRATEGIES)
        assert {(row["grid"], row["tokens"], row["recipe"], row["size"]) for row in found} == {
            ("5x38", 190, "msm_mae", "tiny")
        }
        assert f"msm_mae tiny, 5x38, {clips} clips" in done.stdout
    assert all(name in done.stdout for name in STRATEGIES)
    assert report["scaling"] == [] and report["made_with"]["device"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--grids", "5x39"), "no grid '5x39'. Did you mean '5x38'? Allowed: 5x38, 8x62, 64x8"),
        (("--batch-sizes", "4,0"), "--batch-sizes: expected whole numbers of at least 1"),
        (("--batch-sizes", "4;8"), "received '4;8'"),
        (("--batch-sizes", ""), "--batch-sizes: expected whole numbers"),
        (("--seconds", "-1"), "--seconds: must be at least 0; received -1"),
        (("--seconds", "nan"), "--seconds: must be at least 0; received nan"),
        (("--size", "huge"), "Allowed: tiny, small, base"),
        (("--picture", "masking.pdf"), "expected a name ending in .png"),
        (("-o", "/nowhere/masking.png"), "--picture /nowhere/masking.png: cannot be written"),
        (("--device", "gpu"), "gpu"),
        (("--recipe", "maskspec"), "no option '--recipe'"),
    ],
)
def test_bad_input_is_named(cli: Cli, arguments: tuple[str, ...], said: str) -> None:
    done = cli("bench", "masking", *arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr


def test_help_says_what_the_options_are(cli: Cli) -> None:
    done = cli("bench", "masking", "--help")
    assert done.returncode == 0
    assert "--batch-sizes" in done.stdout and "8x62 (mae_ast_patch, maskspec)" in " ".join(
        done.stdout.split()
    )
    assert "bench masking" in cli("bench").stdout
