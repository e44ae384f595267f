# SPDX-License-Identifier: Apache-2.0
"""Batches to mask, views of them, and the statistics of masks that golden/README.md defines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from masktrain.masking.view import View
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, TokenLayout, cumulative

OFFSETS = [(0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (0, 4), (4, 0)]


def key(step: int = 0, seed: int = 42) -> StepKey:
    return StepKey.make(seed, step, "cpu")


def batch(
    columns: Sequence[int],
    freq: int = 4,
    order: str = "time",
    clip_ids: Sequence[int] | None = None,
    patch: int = 1,
    frames: Tensor | None = None,
    progress: float = 0.5,
) -> tuple[TokenLayout, View]:
    """The tokens of clips of so many columns, patches of patch x patch, and their view. frames: (T, freq * patch),
    by default noise that depends on the clip's id alone."""
    grid = TokenGrid(freq=freq, patch_freq=patch, patch_time=patch, order=order)  # type: ignore[arg-type]
    ids = list(range(len(columns))) if clip_ids is None else list(clip_ids)
    lengths = tuple(c * patch for c in columns)
    if frames is None:
        noise = [
            torch.randn(n, freq * patch, generator=torch.Generator().manual_seed(i))
            for n, i in zip(lengths, ids, strict=True)
        ]
        frames = torch.cat([torch.empty(0, freq * patch), *noise])
    cu = cumulative(lengths, torch.int64, "cpu")
    spectrogram = Spectrogram(frames, lengths, cu, torch.tensor(ids, dtype=torch.int64))
    return grid.layout(spectrogram), View(progress, spectrogram, torch.zeros(1), torch.ones(1))


def local_visible(plan: MaskPlan) -> list[list[int]]:
    """The visible tokens of each clip, counted from its first."""
    starts = plan.layout.cu_tokens[:-1].tolist()
    return [(p - s).tolist() for p, s in zip(plan.visible.split(list(plan.n_visible)), starts, strict=True)]


def shown(plan: MaskPlan) -> Tensor:
    """(N,) bool, True where visible."""
    flat = torch.zeros(sum(plan.layout.lengths), dtype=torch.bool)
    flat[plan.visible.long()] = True
    return flat


def rate_z(visible: Tensor, rate: np.ndarray, n: int) -> np.ndarray:
    """z of each token's visible rate, of (draws, ...) against a rate over n draws; infinite where a rate without
    spread differs."""
    draws = len(visible)
    ours = visible.flatten(1).double().mean(0).numpy()
    pooled = (rate * n + ours * draws) / (n + draws)
    error = np.sqrt(pooled * (1 - pooled) * (1 / n + 1 / draws))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error > 0, (ours - rate) / error, np.where(ours == rate, 0, np.inf))


def mean_z(values: Tensor, stored: np.ndarray) -> float:
    """z of a mean over draws against [mean, its standard error, ...], stored in float32."""
    ours, error = float(values.double().mean()), float(values.double().std()) / len(values) ** 0.5
    away = max(0.0, abs(ours - float(stored[0])) - 1e-5 * abs(float(stored[0])))
    # A statistic without spread, as that of masks in whole columns, must agree outright.
    return away / max(float(np.hypot(stored[1], error)), 1e-12)


def statistics(v: Tensor) -> dict[str, Tensor]:
    """The statistics of each of (draws, rows, columns) masks, True where visible."""
    above = (v[:, 1:] & v[:, :-1]).sum((1, 2))
    beside = (v[:, :, 1:] & v[:, :, :-1]).sum((1, 2))
    count = v.sum((1, 2))
    return {
        "nb4": 2 * (above + beside) / count,
        "nb_row": 2 * above / count,
        "nb_col": 2 * beside / count,
        "var_per_row": v.sum(2).double().var(1, correction=0),
        "var_per_col": v.sum(1).double().var(1, correction=0),
    }


def pairs(v: Tensor) -> list[Tensor]:
    """For each offset the share of token pairs that are both visible, of each mask."""
    rows, cells = v.shape[1:]
    return [(v[:, a:, b:] & v[:, : rows - a, : cells - b]).double().mean((1, 2)) for a, b in OFFSETS]


def check_like(v: Tensor, recorded: dict[str, np.ndarray], name: str, clip: int | None = None) -> None:
    """Assert that (draws, rows, columns) masks have the recorded rates, neighbours, variances and pairs."""

    def at(field: str) -> np.ndarray:
        stored = recorded[f"{name}/{field}"]
        return stored if clip is None else stored[clip]

    z = rate_z(v, at("visible_rate"), int(recorded[f"{name}/n"]))
    assert np.abs(z).max() < 5, (name, clip, np.abs(z).max())
    assert np.mean(z**2) < 1.4, (name, clip, np.mean(z**2))
    for field, values in statistics(v).items():
        assert mean_z(values, at(field)) < 4.5, (name, clip, field)
    for offset, values, stored in zip(OFFSETS, pairs(v), at("pair_visible"), strict=True):
        assert mean_z(values, stored) < 4.5, (name, clip, "pair", offset)
