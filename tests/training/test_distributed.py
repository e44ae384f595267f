# SPDX-License-Identifier: Apache-2.0
"""Ranks and micro-batches compute the same step as one process, on clips of unequal length with dropout on."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

from masktrain.data.order import check_shards
from masktrain.errors import ConfigError
from masktrain.models import registry
from masktrain.recipes import find
from masktrain.training import optim, precision, schedule
from masktrain.training.distributed import World, join, pick_device
from masktrain.training.step import Step
from masktrain.types import AudioBatch

STEPS = 4
CLIPS = 8


def audio(step: int, first: int, count: int) -> AudioBatch:
    """Clips of unequal length and rate, the same whoever asks for them."""
    clips, lengths, rates = [], [], []
    for i in range(first, first + count):
        rng = np.random.default_rng(1000 * step + i)
        rate = (8000, 16000, 44100)[i % 3]
        n = int(rate * rng.uniform(0.2, 1.5))
        clips.append((0.1 * rng.standard_normal(n) * np.sin(np.arange(n) / 50)).astype(np.float32))
        lengths.append(n)
        rates.append(rate)
    ids = torch.arange(first, first + count)
    samples = torch.from_numpy(np.concatenate(clips))
    return AudioBatch(samples, tuple(lengths), tuple(rates), ids, torch.zeros_like(ids))


def run_steps(
    world: World, accumulation: int, dtype: torch.dtype, recipe_name: str
) -> dict[str, torch.Tensor]:
    """Return weights, running statistics and the numbers of each step after STEPS steps."""
    recipe = find(recipe_name, "tiny")
    model = replace(
        recipe.model,
        encoder_layers=2,
        embed_dim=32,
        ffn_dim=64,
        heads=2,
        decoder_layers=1,
        decoder_embed_dim=32,
        decoder_ffn_dim=64,
        decoder_heads=2,
        encoder_layerdrop=0.3,
    )
    recipe = replace(
        recipe,
        model=model,
        batch_size=CLIPS,
        train=replace(recipe.train, accumulation=accumulation),
        # Adam brings any gradient to the size of the learning rate, also one that is nothing but rounding (that of the
        # matching head for the mel filter that is empty): a larger eps leaves such gradients small
        optim=replace(recipe.optim, eps=1e-4),
    )
    torch.manual_seed(0)
    net = registry.build(recipe.model, recipe.grid, recipe.input_norm).to(dtype)
    resolved = schedule.resolve(recipe.schedule, STEPS, 1e-3)
    step = Step(
        recipe,
        net,
        optim.build(net, recipe.optim, 1e-3),
        resolved,
        world,
        precision.choose("fp32", world.device),
    )
    per_rank = CLIPS // world.size
    micro = per_rank // accumulation
    out: dict[str, torch.Tensor] = {}
    for number in range(STEPS):
        first = world.rank * per_rank
        batches = [audio(number, first + m * micro, micro) for m in range(accumulation)]
        result = step(number, batches)
        out[f"step{number}.loss"] = result.loss.double()
        out[f"step{number}.grad_norm"] = result.grad_norm.double()
        out[f"step{number}.digest"] = torch.tensor(float(result.clips_digest), dtype=torch.float64)
        out[f"step{number}.tokens"] = torch.tensor(float(result.tokens), dtype=torch.float64)
    return out | {name: value.detach().double() for name, value in net.state_dict().items()}


ALONE = World(0, 1, torch.device("cpu"), None)
WORKER = """
import sys, torch
sys.path[:0] = [{folder!r}, {support!r}]
import test_distributed as t
from masktrain.training.distributed import join, leave
torch.set_num_threads(1)
world = join("cpu")
out = t.run_steps(world, int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4])
if world.first:
    torch.save(out, sys.argv[1])
leave()
"""


def torchrun(tmp_path: Path, accumulation: int, dtype: str, recipe: str) -> dict[str, torch.Tensor]:
    script, result = tmp_path / "worker.py", tmp_path / "result.pt"
    script.write_text(
        WORKER.format(folder=str(Path(__file__).parent), support=str(Path(runs.__file__).parent))
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(result), str(accumulation), dtype, recipe]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=runs.environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    return torch.load(result, weights_only=True)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / (1 + a[n].abs().max())) for n in a)


@pytest.mark.parametrize("recipe", ["mae_ast_frame", "mae_ast_patch"])
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
def test_accumulation_is_the_same_step(recipe: str, dtype: str, bound: float) -> None:
    one = run_steps(ALONE, 1, getattr(torch, dtype), recipe)
    two = run_steps(ALONE, 2, getattr(torch, dtype), recipe)
    assert largest_difference(one, two) < bound


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
def test_two_ranks_are_the_same_step(tmp_path: Path, dtype: str, bound: float) -> None:
    one = run_steps(ALONE, 1, getattr(torch, dtype), "mae_ast_frame")
    two = torchrun(tmp_path, 1, dtype, "mae_ast_frame")
    assert largest_difference(one, two) < bound


def test_two_ranks_with_accumulation(tmp_path: Path) -> None:
    one = run_steps(ALONE, 1, torch.float64, "mae_ast_patch")
    assert largest_difference(one, torchrun(tmp_path, 2, "float64", "mae_ast_patch")) < 1e-10


def test_the_comparison_can_fail() -> None:
    """Another batch order, hence other clips under the same positions, is seen."""
    one = run_steps(ALONE, 1, torch.float64, "mae_ast_frame")
    other = {**one, "step1.loss": one["step1.loss"] + 1e-6}
    assert largest_difference(one, other) > 1e-10


def test_two_ranks_run_the_command(tmp_path: Path) -> None:
    clips = runs.make_clips(tmp_path / "audio", 24)
    arguments = ["run", "--recipe", "mae_ast_frame", *runs.SMALL, "--steps", "4", "--data", str(clips)]
    alone = runs.masktrain(*arguments, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    script = tmp_path / "main.py"
    script.write_text("from masktrain.cli import main; main()")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    command += [*arguments, "--out", str(tmp_path / "both")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=runs.environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = runs.rows(tmp_path / "both"), runs.rows(tmp_path / "alone")
    assert [r["clip_ids"] for r in ours] == [r["clip_ids"] for r in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 or 10"):
        check_shards(9, 2, 1)


@pytest.mark.parametrize("size", ["abc", "0", "-2", ""])
def test_a_world_of_no_size_is_refused(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match="torchrun"):
        join("cpu")


def test_an_absent_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="allowed: auto, cpu, cuda"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            pick_device("cuda")
