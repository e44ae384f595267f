# SPDX-License-Identifier: Apache-2.0
"""The recipes of SSAST: published sizes, counts of masked tokens, what they refuse, whole runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import runs
import torch

from masktrain.cli import _main
from masktrain.config import flatten
from masktrain.models import registry
from masktrain.recipes import SIZES, find
from masktrain.training import optim
from masktrain.types import Spectrogram, StepKey, cumulative

NAMES = ("ssast_patch", "ssast_frame")
# a model of a few thousand weights: the run, not the model, is under test
SMALL = """--size tiny --model.encoder-layers 2 --model.embed-dim 32 --model.ffn-dim 64 --model.heads 2
--train.pictures 0 --batch-size 8 --device cpu --loader soundfile""".split()


def spectrogram_of(lengths: tuple[int, ...]) -> Spectrogram:
    frames = torch.randn(sum(lengths), 128)
    return Spectrogram(frames, lengths, cumulative(lengths, torch.int64, "cpu"), torch.arange(len(lengths)))


@pytest.mark.parametrize(("size", "millions"), [("tiny", 6), ("small", 23), ("base", 89)])
@pytest.mark.parametrize("name", NAMES)
def test_published_parameter_counts(name: str, size: str, millions: int) -> None:
    """By hand, and the published figures, which include two class heads that pretraining never uses."""
    recipe = find(name, size)
    with torch.device("meta"):
        model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    ours = sum(p.numel() for p in model.parameters())
    d = recipe.model.embed_dim
    block = 12 * d * d + 13 * d
    heads = 2 * (d * d + d + d * 256 + 256)
    assert ours == 12 * block + (256 * d + d) + 2 * d + (512 + 2) * d + 3 * d + heads
    class_heads = 2 * (1000 * d + 1000)
    assert round((ours + class_heads) / 1e6) == millions
    if size == "base":
        assert (ours + class_heads) / 1e6 == pytest.approx(88.76, abs=0.005)


@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens(name: str) -> None:
    """400 of 512, as the code; the masks of both passes, of clips and of steps are different ones."""
    recipe = find(name)
    layout = recipe.grid.layout(spectrogram_of((1024, 1024, 998)))
    assert layout.lengths[:2] == (512, 512)
    masks = []
    for step in (0, 1):
        key = StepKey.make(0, step, "cpu")
        for draw in range(recipe.model.masks):
            plan = recipe.masking.plan(layout, key, draw)
            assert plan.n_masked[:2] == (400, 400)
            masks += [plan.masked[:400], plan.masked[400:800] - 512]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 8


@pytest.mark.parametrize("name", NAMES)
def test_positions_cover_the_clips(name: str) -> None:
    """Exactly the published table: 1024 frames, and so the 10 s of the recipe."""
    recipe = find(name)
    assert recipe.model.columns == recipe.grid.columns(1024)
    assert recipe.data.clip_seconds is not None
    frames = recipe.frontend.frames_for(int(recipe.data.clip_seconds * 16_000), 16_000)
    assert recipe.grid.columns(frames) <= recipe.model.columns


def test_optimiser() -> None:
    """Adam with the decay in the gradient of every parameter."""
    recipe = find("ssast_patch", "tiny")
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    built = optim.build(model, recipe.optim, recipe.optim.peak_lr(recipe.batch_size))
    assert type(built) is torch.optim.Adam
    (group,) = built.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        1.5e-4,
        (0.95, 0.999),
        1e-8,
        5e-7,
    )
    assert len(group["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", SIZES)
def test_the_switches_that_readings_name(name: str, size: str) -> None:
    """Each is a field of the recipe, and has another value in it."""
    recipe = find(name, size)
    fields = flatten(recipe)
    named = re.findall(r"--([a-z-]+(?:\.[a-z-]+)*)((?: (?!--)[\w.]+)?)", " ".join(recipe.readings))
    assert len(named) >= 8
    for switch, value in named:
        field = switch.replace("-", "_")
        assert field in fields, switch
        assert not value or value.strip() != str(fields[field]), switch


@pytest.mark.parametrize(
    "changes",
    ["--model.passes 1 --model.columns 10", "--data.padding reference --data.target-length 1026"],
    ids=["table", "padding"],
)
def test_longer_clips_are_refused_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: str
) -> None:
    clips = runs.make_clips(tmp_path / "audio", count=4)
    common = ["run", "--recipe", "ssast_frame", *SMALL, "--steps", "1"]
    where = ["--data", str(clips), "--out", str(tmp_path / "run")]
    assert _main([*common, *changes.split(), *where]) == 2
    said = capsys.readouterr()
    assert "model.columns: the learned positions end after" in said.err
    assert "step 1" not in said.out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("passes", ["1", "2"])
@pytest.mark.slow(
    covers=[
        "masktrain/models/ssast.py",
        "masktrain/recipes/ssast.py",
        "masktrain/masking",
        "masktrain/training",
    ]
)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, name: str, passes: str) -> None:
    """From the checkpoint in its middle to the same weights and numbers."""
    clips = runs.make_clips(tmp_path / "audio", count=24)
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = [
        "--recipe",
        name,
        *SMALL,
        "--model.passes",
        passes,
        "--steps",
        "6",
        "--checkpoint-every",
        "3",
    ]
    done = runs.masktrain("run", *arguments, "--data", clips, "--out", first)
    assert done.returncode == 0, done.stderr
    shutil.copytree(first, second)
    shutil.rmtree(second / "checkpoints" / "step_00000006")
    done = runs.masktrain("run", "--resume", second)
    assert done.returncode == 0, done.stderr
    assert len(runs.trace(first)) == 6
    assert runs.trace(first) == runs.trace(second)
    assert runs.tensors(first) == runs.tensors(second)
