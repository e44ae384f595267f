# SPDX-License-Identifier: Apache-2.0
"""Statistics per mel bin: measured on training clips before the first step, shared by ranks, kept with the weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import runs
import soundfile
import torch

from masktrain.cli import _main
from masktrain.data.index import index_manifest
from masktrain.data.readers import load_manifest
from masktrain.frontend.frontend import Frontend
from masktrain.models.input_norm import InputNorm, InputNormConfig
from masktrain.recipes import find
from masktrain.training import checkpoint
from masktrain.training.corpus import split
from masktrain.types import AudioBatch

PER_BIN = ["run", "--recipe", "mae_ast_frame", *runs.SMALL, "--input-norm.kind", "per_bin", "--steps", "2"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_clips(tmp_path_factory.mktemp("audio"), 24)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert _main([*PER_BIN, "--data", str(clips), "--out", str(out)]) == 0
    return out


def bins(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    saved = checkpoint.latest(run / "checkpoints").checkpoint
    assert saved is not None
    return saved.tensors["model"]["input_norm.bin_mean"], saved.tensors["model"]["input_norm.bin_std"]


def test_they_are_those_of_the_training_clips(run: Path, clips: Path) -> None:
    recipe = find("mae_ast_frame", "tiny")
    training, held_out = split(index_manifest(load_manifest([clips])[0])[0], recipe)
    assert len(held_out) == 4
    frames = []
    for row in range(len(training)):
        wave, rate = soundfile.read(training.path(row), dtype="float32")
        samples = torch.from_numpy(wave)
        ids = torch.tensor([row])
        batch = AudioBatch(samples, (len(samples),), (rate,), ids, torch.zeros_like(ids))
        frames.append(Frontend(recipe.frontend)(batch).frames.double().numpy())
    truth = np.concatenate(frames)
    mean, std = bins(run)
    np.testing.assert_allclose(mean, truth.mean(0), rtol=0, atol=1e-5)
    np.testing.assert_allclose(std, truth.std(0), rtol=1e-5, atol=1e-6)


def test_a_resumed_run_keeps_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = bins(run)
    assert _main(["run", "--resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert "each mel bin, from the checkpoint" in said and "mel bins, measured on" not in said
    assert all(torch.equal(a, b) for a, b in zip(before, bins(run), strict=True))


def test_a_run_that_was_killed_before_its_first_checkpoint_measures_again(
    tmp_path: Path, clips: Path, run: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert _main(["run", "--resume", str(tmp_path / "run")]) == 0
    assert all(torch.equal(a, b) for a, b in zip(bins(run), bins(tmp_path / "run"), strict=True))
    assert runs.tensors(run) == runs.tensors(tmp_path / "run")


def test_weights_bring_theirs(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = runs.make_clips(tmp_path / "audio", 24, seed=1)
    out = tmp_path / "out"
    assert _main([*PER_BIN, "--data", str(other), "--out", str(out), "--init-from", str(run)]) == 0
    said = capsys.readouterr().out
    assert "as the weights of --init-from bring them" in said and "mel bins, measured on" not in said
    assert all(torch.equal(a, b) for a, b in zip(bins(run), bins(out), strict=True))


def test_what_is_said(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five clips are measured, and a floor that all bins lie under is named."""
    few = ["--input-norm.measured-clips", "5", "--input-norm.std-floor", "100"]
    assert _main([*PER_BIN, *few, "--data", str(clips), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "each of the 128 mel bins, measured on 5 of 20 clips; 128 bins are divided by" in said
    assert (
        "warning: mel bins with a standard deviation under 100: 128 of 128 (0, 1, 2, 3, 4, 5, 6, 7, ...)"
        in said
    )


def test_two_ranks_share_the_first_ones(tmp_path: Path, clips: Path, run: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import os, torch\n"
        "from masktrain.models.input_norm import InputNorm\n"
        "take = InputNorm.set_bins\n"
        "def kept(self, mean, std):\n"
        "    take(self, mean, std)\n"
        "    torch.save((self.bin_mean, self.bin_std), os.environ['KEPT'] + os.environ['RANK'])\n"
        "InputNorm.set_bins = kept\n"
        "from masktrain.cli import main\n"
        "main()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    command += [*PER_BIN, "--data", str(clips), "--out", str(tmp_path / "run")]
    env = {**runs.environment(), "KEPT": str(tmp_path / "kept")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measured on 20 of 20 clips") == 1
    for rank in (0, 1):
        kept = torch.load(tmp_path / f"kept{rank}", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(bins(run), kept, strict=True))


def test_a_bad_corpus_ends_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files whose headers are right and whose samples are not are found while measuring: one message, status 2."""
    folder = runs.make_clips(tmp_path / "audio", 40)
    for path in sorted(folder.glob("*.flac")):
        content = bytearray(path.read_bytes())
        content[len(content) // 3 :] = b"\x00" * (len(content) - len(content) // 3)
        path.write_bytes(content)
    assert _main([*PER_BIN, "--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert "clip" in captured.err and "Traceback" not in captured.err
    assert not (tmp_path / "run").exists()


def test_affine_divides_by_the_floor() -> None:
    norm = InputNorm(InputNormConfig(kind="per_bin", factor=0.5, std_floor=0.1), 3)
    norm.set_bins(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.05, 0.1, 4.0]))
    mean, scale = norm.affine(None)
    assert mean.tolist() == [1.0, 2.0, 3.0]
    torch.testing.assert_close(scale, torch.tensor([5.0, 5.0, 0.125]))
