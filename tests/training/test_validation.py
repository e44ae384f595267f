# SPDX-License-Identifier: Apache-2.0
"""Which clips are held out and drawn, and that patches go back to the cells they came from."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.data.index import index_manifest
from masktrain.data.readers import load_manifest
from masktrain.errors import ConfigError
from masktrain.kernels.mask_gather import mask_gather
from masktrain.masking.strategies import RandomMasking
from masktrain.recipes import find
from masktrain.training.corpus import split
from masktrain.training.pictures import Validation, mask_grids
from masktrain.training.report import ending, held_out_line, is_validation, summarise
from masktrain.training.validation import assemble, spread
from masktrain.types import Spectrogram, StepKey, TokenGrid, cumulative


@settings(deadline=None, max_examples=40)
@given(
    order=st.sampled_from(["time", "freq"]),
    freq=st.integers(1, 4),
    patch_freq=st.integers(1, 5),
    patch_time=st.integers(1, 5),
    columns=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_assemble_undoes_mask_gather(
    order: str, freq: int, patch_freq: int, patch_time: int, columns: int, seed: int
) -> None:
    grid = TokenGrid(freq=freq, patch_freq=patch_freq, patch_time=patch_time, order=order, partial="drop")
    frames = torch.randn(
        columns * patch_time, freq * patch_freq, generator=torch.Generator().manual_seed(seed)
    )
    lengths = (len(frames),)
    spectrogram = Spectrogram(frames, lengths, cumulative(lengths, torch.int64, "cpu"), torch.tensor([seed]))
    layout = grid.layout(spectrogram)
    plan = RandomMasking(mask_ratio=0.5).plan(layout, StepKey.make(seed, 0, "cpu"))
    patches = mask_gather(
        frames, layout.cu_frames, layout.cu_tokens, plan.masked, mean=torch.zeros(1), scale=torch.ones(1),
        freq=freq, patch_freq=patch_freq, patch_time=patch_time, order=order,
    )  # fmt: skip
    canvas, masked = assemble(mask_grids(plan)[0], patches.numpy(), patch_freq, patch_time, order)
    assert masked.sum() == sum(plan.n_masked) * grid.patch_values
    np.testing.assert_array_equal(canvas, np.where(masked, frames.numpy(), 0))


def test_spread_takes_short_and_long_ones() -> None:
    lengths = [50, 10, 40, 20, 30, 60, 80, 70]
    assert [lengths[i] for i in sorted(spread(lengths, 4), key=lambda i: lengths[i])] == [20, 40, 60, 80]
    assert spread(lengths, 0) == []
    assert spread([5, 5], 4) == [0, 1]
    assert spread([], 4) == []


def test_split_is_disjoint_complete_and_fixed(tmp_path: Path) -> None:
    entries, _ = load_manifest([runs.make_clips(tmp_path, 60)])
    manifest, _ = index_manifest(entries)
    recipe = find("mae_ast_frame", "tiny")
    training, held_out = split(manifest, recipe)
    assert len(held_out) == 4 and len(training) == 56
    assert sorted([*training.paths, *held_out.paths]) == sorted(manifest.paths)
    assert list(split(manifest, recipe)[1].paths) == list(held_out.paths)
    other = split(manifest, replace(recipe, seed=1))[1]
    assert list(other.paths) != list(held_out.paths)
    with pytest.raises(ConfigError, match="60 of 60"):
        split(manifest, replace(recipe, train=replace(recipe.train, validation_clips=60)))


def test_summary_takes_the_means_that_it_names() -> None:
    rows = [
        {
            "step": s,
            "loss": float(s),
            "loss_mse": 0.1 * s,
            "loss_max": 9.0,
            "clips_per_s": 1.0,
            "peak_memory_gib": s,
        }
        for s in range(1, 41)
    ]
    for row in rows[1:6]:
        row |= {"baseline_loss": 7.0 + row["step"], "baseline_mse": 0.5}
    summary = summarise(rows, [], 40, 40)
    assert summary["loss_first"] == 4.0  # steps 2 to 6
    assert summary["loss_last"] == pytest.approx(38.5)  # steps 37 to 40
    assert summary["loss_baseline"] == 11.0
    assert summary["last_mse"] == pytest.approx(3.85) and summary["baseline_mse"] == 0.5
    assert summary["complete"] and summary["peak_memory_gib"] == 40
    assert not summarise(rows[:20], [], 20, 40)["complete"]


def test_errors_are_in_the_summary_and_on_the_console() -> None:
    first = Validation(0, 9.0, {"mse": 0.9}, 5.0, {"mse": 0.5}, 0.9, 0.4, 0.2)
    last = Validation(40, 2.0, {"mse": 0.1}, 5.0, {"mse": 0.5}, 0.125, 0.4, 0.2)
    summary = summarise([], [first, last], 40, 40)
    assert (summary["error"], summary["error_bin_mean"], summary["error_interpolation"]) == (0.125, 0.4, 0.2)
    words = "squared error of masked cells 0.125, interpolated in time 0.2, per-bin mean 0.4"
    assert held_out_line(last) == f"held-out clips after 40 steps: loss 2 (per-bin mean 5); {words}"
    summary |= {"seconds": 1.0, "bad_clips": [], "clip_notes": {}}
    assert ("error", words) in ending(summary, Path("run"))
    matching = Validation(40, 2.0, {}, 5.0, {})
    assert "squared error" not in held_out_line(matching)
    assert is_validation(asdict(last)) and is_validation(asdict(matching))
    assert not is_validation({**asdict(last), "error": "0.1"})
    older = asdict(last)
    del older["error_interpolation"]
    assert not is_validation(older)
