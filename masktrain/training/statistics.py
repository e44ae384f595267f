# SPDX-License-Identifier: Apache-2.0
"""Mean and standard deviation of the log-mel of a data set: what `dataset_mean` and `dataset_std` are set to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from masktrain.data.config import DataConfig
from masktrain.data.crop import crop_length, crop_start
from masktrain.data.decode import Crop, Result, try_crop
from masktrain.data.loader import default_workers
from masktrain.data.manifest import BadClip, Manifest, bad_clips_error, too_many
from masktrain.data.order import order
from masktrain.errors import ConfigError
from masktrain.frontend.config import FrontendConfig
from masktrain.frontend.frontend import Frontend
from masktrain.frontend.stats import RunningStats, Statistics
from masktrain.types import AudioBatch

GROUP = 16


@dataclass(frozen=True)
class Measured:
    """statistics: of every frame of `clips` clips. bad: clips that could not be read, which are not in them."""

    statistics: Statistics
    clips: int
    bad: list[BadClip]


def measure_statistics(
    manifest: Manifest,
    frontend: FrontendConfig,
    *,
    clips: int | None = None,
    clip_seconds: float | None = 10.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Measure all clips, or `clips` of them drawn by (seed, ORDER, epoch 0), each cropped as in epoch 0 of a run.

    clip_seconds: longest crop; None takes whole files. Raises DataError for too many bad clips, ConfigError for
    numbers out of their range.
    """
    DataConfig(clip_seconds=clip_seconds)
    if clips is not None and not 1 <= clips <= len(manifest):
        raise ConfigError(
            f"--clips: must lie in 1 to {len(manifest)}, the clips there are; received {clips}."
        )
    chosen = np.arange(len(manifest)) if clips is None else np.sort(order(seed, 0, len(manifest))[:clips])
    transform = Frontend(frontend)
    running = RunningStats(frontend.n_mels)
    bad: list[BadClip] = []

    def crop(row: int) -> Crop:
        samples, rate = int(manifest.num_samples[row]), int(manifest.sample_rate[row])
        length = crop_length(samples, rate, clip_seconds)
        start = crop_start(seed, 0, row, samples, length)
        return Crop(manifest.path(row), start, length, samples, rate, frontend.min_samples(rate))

    for done, (rows, results) in enumerate(_decoded([crop(row) for row in chosen.tolist()], chosen)):
        used = []
        for row, result in zip(rows.tolist(), results, strict=True):
            if isinstance(result, Exception):
                bad.append(BadClip(manifest.path(row), str(result), manifest.where(row)))
            else:
                used.append((row, result.samples))
        if too_many(len(bad), len(manifest)):
            raise bad_clips_error(bad, len(manifest))
        if used:
            running.update(
                transform(
                    AudioBatch(
                        samples=torch.from_numpy(np.concatenate([samples for _, samples in used])),
                        lengths=tuple(len(samples) for _, samples in used),
                        sample_rates=tuple(int(manifest.sample_rate[row]) for row, _ in used),
                        clip_ids=torch.tensor([row for row, _ in used], dtype=torch.int64),
                        starts=torch.zeros(len(used), dtype=torch.int64),
                    )
                )
            )
        progress(min(len(chosen), (done + 1) * GROUP), len(chosen))
    return Measured(running.result(), len(chosen) - len(bad), bad)


def _decoded(crops: list[Crop], rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], list[Result]]]:
    """Yield groups of rows with what their crops hold; the next group is decoded meanwhile, and no more than that."""
    starts = range(0, len(crops), GROUP)
    with ThreadPoolExecutor(default_workers()) as pool:
        ahead = [pool.submit(try_crop, c) for c in crops[:GROUP]]
        for start in starts:
            current, ahead = (
                ahead,
                [pool.submit(try_crop, c) for c in crops[start + GROUP : start + 2 * GROUP]],
            )
            yield rows[start : start + GROUP], [task.result() for task in current]
