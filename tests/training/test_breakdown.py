# SPDX-License-Identifier: Apache-2.0
"""A loss that is no number, or explodes, stops the run, and what the step was made of is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs


@pytest.mark.parametrize(("lr", "said"), [("1e18", "is nan"), ("10", "100 times its first")])
def test_a_broken_run_stops_and_leaves_its_evidence(tmp_path: Path, lr: str, said: str) -> None:
    clips = runs.make_clips(tmp_path / "audio", 24)
    arguments = ["run", "--recipe", "mae_ast_frame", *runs.SMALL, "--steps", "40", "--data", clips]
    # without clipping, at these rates, weights leave every bound within a few steps
    done = runs.masktrain(
        *arguments, "--optim.lr", lr, "--optim.clip-norm", "None", "--out", tmp_path / "run"
    )
    assert done.returncode == 2, done.stdout
    assert (
        "Training has broken down" in done.stderr and said in done.stderr and "Traceback" not in done.stderr
    )
    (evidence,) = (tmp_path / "run").glob("breakdown_step_*.json")
    kept = json.loads(evidence.read_text())
    assert str(evidence) in done.stderr
    assert kept["row"]["step"] == int(evidence.stem.rsplit("_", 1)[1])
    assert len(kept["clips"]) == 8 and all(Path(clip).parent == clips for clip in kept["clips"])
