# SPDX-License-Identifier: Apache-2.0
"""Chunk masks against the statistics of those that the SSAST and MAE-AST codes draw.

Both sides are samples, so rates and means are compared by z-tests. Seeds are fixed: the draws are the same
on every machine.
"""

from __future__ import annotations

import json

import numpy as np
import torch
from masks import OFFSETS, mean_z, pairs, rate_z, statistics
from torch import Tensor

from masktrain.masking import ChunkMasking
from masktrain.types import Spectrogram, StepKey, TokenGrid, cumulative

AT_ONCE = 1000


def draw(masking: ChunkMasking, columns: int, freq: int, order: str, draws: int) -> Tensor:
    """(draws, rows, cells of a row) bool, True where visible, rows along the outer axis of `order`."""
    out = []
    lengths = (columns,) * AT_ONCE
    grid = TokenGrid(freq=freq, patch_freq=1, patch_time=1, order=order)
    for start in range(0, draws, AT_ONCE):
        ids = torch.arange(start, start + AT_ONCE)
        frames, cu = torch.zeros(columns * AT_ONCE, 1), cumulative(lengths, torch.int64, "cpu")
        plan = masking.plan(grid.layout(Spectrogram(frames, lengths, cu, ids)), StepKey.make(1, 0, "cpu"))
        visible = torch.zeros(AT_ONCE * columns * freq, dtype=torch.bool)
        visible[plan.visible.long()] = True
        out.append(
            visible.view(AT_ONCE, columns, freq) if order == "time" else visible.view(AT_ONCE, freq, columns)
        )
    return torch.cat(out)


def test_legacy_chunks_follow_the_reference_distribution(golden_dir):
    files = sorted((golden_dir / "masking").glob("*chunk*.json"))
    assert files
    for file in files:
        z = np.load(file.with_suffix(".npz"))
        for name, setting in json.loads(file.read_text())["settings"].items():
            rows, cells = setting["grid"]
            tokens, n_visible = rows * cells, int(z[f"{name}/visible_count_hist"][0, 0])
            mae_ast = setting["peer"].startswith("MAE-AST")
            order, columns, freq = ("time", rows, cells) if mae_ast else ("freq", cells, rows)
            # SSAST states the count of masked tokens: half a token less makes the ratio safe from rounding.
            ratio = setting["random_mask_prob"] if mae_ast else (setting["masked"] - 0.5) / tokens
            legacy = {
                "mask_ratio": ratio,
                "growth": "wrap",
                "truncation": "first",
                "spare_first": not mae_ast,
            }

            v = draw(ChunkMasking(**legacy), columns, freq, order, 8000)
            assert (v.sum((1, 2)) == n_visible).all()
            score = rate_z(v, z[f"{name}/visible_rate"], int(z[f"{name}/n"]))
            assert np.abs(score).max() < 4.5, (name, np.abs(score).max())
            assert np.mean(score**2) < 1.4, (name, np.mean(score**2))
            for statistic, values in statistics(v).items():
                assert abs(mean_z(values, z[f"{name}/{statistic}"])) < 4, (name, statistic)
            for offset, values, stored in zip(OFFSETS, pairs(v), z[f"{name}/pair_visible"], strict=True):
                assert abs(mean_z(values, stored)) < 4, (name, "pair", offset)

            for side, n in zip((3, 4, 5), z[f"{name}/cluster_size_n"], strict=True):
                v = draw(ChunkMasking(**legacy, sides=(side,)), columns, freq, order, 3000)
                score = rate_z(v, z[f"{name}/visible_rate_c{side}"], int(n))
                assert np.abs(score).max() < 4.5, (name, side, np.abs(score).max())
                assert np.mean(score**2) < 1.4, (name, side, np.mean(score**2))
                assert abs(mean_z(statistics(v)["nb4"], z[f"{name}/nb4_c{side}"])) < 4, (name, side)


def test_the_default_masks_all_cells_at_nearly_one_rate_and_the_legacy_does_not():
    default = 1 - draw(ChunkMasking(), 62, 8, "time", 8000).double().mean(0)
    # The marginals of the placement are equal; what is left comes from the stop and is small.
    assert (default - 0.75).abs().max() < 0.03
    assert (default.mean(0) - 0.75).abs().max() < 0.01
    assert (default.mean(1) - 0.75).abs().max() < 0.01
    legacy = 1 - draw(ChunkMasking(growth="wrap", truncation="first"), 62, 8, "time", 2000).double().mean(0)
    assert legacy.mean(1).min() < 0.4


def test_the_default_still_masks_chunks():
    default = statistics(draw(ChunkMasking(), 62, 8, "time", 2000))["nb4"].mean()
    # Random masks at this ratio: 3.73 neighbours on average, each visible with probability 123 / 495.
    assert default > 2 * 3.73 * 123 / 495
