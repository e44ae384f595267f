# SPDX-License-Identifier: Apache-2.0
"""The length policies of MAE-AST as a run applies them: packed, fixed with the reference's padding, cropped to the
shortest clip of the batch, and another longest crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import runs
import soundfile

RATE = 16000
# seconds of the eight clips, all in each batch; Kaldi's frames: 1 + (samples - 400) // 160
SECONDS = (0.30, 0.45, 0.60, 0.75, 0.90, 1.05, 1.20, 1.35)
FRAMES = [1 + (int(s * RATE) - 400) // 160 for s in SECONDS]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lengths")
    rng = np.random.default_rng(0)
    for i, seconds in enumerate(SECONDS):
        wave = 0.1 * rng.standard_normal(int(seconds * RATE))
        soundfile.write(folder / f"{i}.wav", wave, RATE, subtype="PCM_16")
    return folder


def tokens_of(clips: Path, out: Path, recipe: str, *options: str) -> tuple[dict[str, float], str]:
    """Return the last row of a two-step run and what it said."""
    done = runs.masktrain(
        "run", "--recipe", recipe, *runs.SMALL, "--steps", "3", "--data", clips, "--out", out, *options
    )
    assert done.returncode == 0, done.stderr
    row = runs.rows(out)[-1]
    # tokens of one step: the rate times the time of a step
    row["tokens"] = round(row["tokens_per_s"] * row["step_ms"] / 1000)
    return row, done.stdout


def test_packed_clips_keep_their_lengths(clips: Path, tmp_path: Path) -> None:
    row, said = tokens_of(clips, tmp_path / "run", "mae_ast_frame")
    assert row["tokens"] == sum(n // 2 for n in FRAMES)
    assert row["padding_share"] == 0
    assert "packed without padding" in said


def test_patches_drop_what_no_patch_fills(clips: Path, tmp_path: Path) -> None:
    row, _ = tokens_of(clips, tmp_path / "run", "mae_ast_patch")
    assert row["tokens"] == sum(8 * (n // 16) for n in FRAMES)


def test_reference_padding_is_attended_and_said(clips: Path, tmp_path: Path) -> None:
    options = ("--data.padding", "reference", "--data.target-length", "200")
    row, said = tokens_of(clips, tmp_path / "run", "mae_ast_frame", *options)
    assert row["tokens"] == len(FRAMES) * 100
    assert row["padding_share"] == pytest.approx(1 - sum(n // 2 for n in FRAMES) / (len(FRAMES) * 100))
    assert "of the tokens are padding" in said


def test_silence_fills_clips_before_the_front_end(clips: Path, tmp_path: Path) -> None:
    options = ("--data.padding", "silence", "--data.clip-seconds", "1.5")
    row, said = tokens_of(clips, tmp_path / "run", "mae_ast_frame", *options)
    frames = 1 + (int(1.5 * RATE) - 400) // 160
    assert row["tokens"] == len(FRAMES) * (frames // 2)
    assert row["padding_share"] == pytest.approx(
        1 - sum(n // 2 for n in FRAMES) / (len(FRAMES) * (frames // 2))
    )
    assert "of the tokens are padding" in said


def test_crop_to_the_shortest_of_the_batch(clips: Path, tmp_path: Path) -> None:
    row, _ = tokens_of(clips, tmp_path / "run", "mae_ast_frame", "--data.crop-to-batch-min")
    assert row["tokens"] == len(FRAMES) * (min(FRAMES) // 2)
    assert row["padding_share"] == 0


def test_another_longest_crop(clips: Path, tmp_path: Path) -> None:
    row, _ = tokens_of(clips, tmp_path / "run", "mae_ast_frame", "--data.clip-seconds", "0.5")
    longest = 1 + (int(0.5 * RATE) - 400) // 160
    assert row["tokens"] == sum(min(n, longest) // 2 for n in FRAMES)


def test_one_mask_for_the_batch_needs_one_length(clips: Path, tmp_path: Path) -> None:
    arguments = ["run", "--recipe", "mae_ast_patch", *runs.SMALL, "--steps", "1", "--data", clips]
    shared = ["--masking.shared-in-batch", "--masking.growth", "wrap", "--masking.truncation", "first"]
    refused = runs.masktrain(*arguments, *shared, "--out", tmp_path / "a")
    assert refused.returncode == 2 and "equal length" in refused.stderr
    done = runs.masktrain(*arguments, *shared, "--data.crop-to-batch-min", "--out", tmp_path / "b")
    assert done.returncode == 0, done.stderr
