# SPDX-License-Identifier: Apache-2.0
"""Starts runs as a user would, in processes of their own, and reads what they left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

COMMAND = [sys.executable, "-c", "from masktrain.cli import main; main()"]
# A model of a few thousand weights: the loop, not the model, is under test.
SMALL = """--size tiny --model.encoder-layers 2 --model.decoder-layers 1 --model.embed-dim 32 --model.ffn-dim 64
--model.heads 2 --model.decoder-embed-dim 32 --model.decoder-ffn-dim 64 --model.decoder-heads 2
--model.encoder-layerdrop 0.3 --train.pictures 0 --batch-size 8 --device cpu --loader soundfile""".split()


def environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def start(*arguments: str | Path, threads: int = 1) -> subprocess.Popen[str]:
    """Start `masktrain ARGUMENTS`."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(threads),
    )


def masktrain(
    *arguments: str | Path, threads: int = 1, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `masktrain ARGUMENTS` to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(threads),
        check=False,
    )


def make_clips(folder: Path, count: int = 40, seed: int = 0) -> Path:
    """Write short clips of unequal length and rate and return their folder."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rate = (8000, 16000, 22050)[i % 3]
        n = int(rate * rng.uniform(0.3, 1.2))
        t = np.arange(n) / rate
        wave = 0.3 * np.sin(
            2 * np.pi * rng.uniform(100, 2000) * t * (1 + 0.2 * t)
        ) + 0.02 * rng.standard_normal(n)
        soundfile.write(folder / f"clip{i:03d}.{'wav' if i % 2 else 'flac'}", wave, rate, subtype="PCM_16")
    return folder


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# what a resumed run must repeat bit for bit
EXACT = ("step", "loss", "loss_mse", "loss_info_nce", "lr", "grad_norm", "clip_ids")


def trace(run: Path) -> list[tuple[Any, ...]]:
    """Return the exact columns of every row."""
    return [tuple(row[name] for name in EXACT) for row in rows(run)]


def tensors(run: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of the newest checkpoint, by group and name."""
    from masktrain.training import checkpoint

    saved = checkpoint.latest(run / "checkpoints").checkpoint
    assert saved is not None
    return {
        f"{group}/{name}": bytes(tensor.contiguous().view(-1).numpy().tobytes())
        for group, values in saved.tensors.items()
        for name, tensor in values.items()
    }
