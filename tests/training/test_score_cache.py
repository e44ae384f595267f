# SPDX-License-Identifier: Apache-2.0
"""Kept scores belong to the patches they were computed for, are refreshed when due, and survive a resume bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from masktrain.cli.run import main as run
from masktrain.data.augment import AugmentConfig
from masktrain.data.config import DataConfig
from masktrain.data.crop import crop_length, crop_start
from masktrain.errors import CheckpointError, ConfigError
from masktrain.masking.plan import visible_count
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.recipes import find
from masktrain.training import score_cache
from masktrain.training.recipe import Recipe
from masktrain.training.score_cache import ScoreCache, check, column_samples, ranks
from masktrain.types import AudioBatch, Spectrogram, TokenLayout, cumulative

CPU = torch.device("cpu")


def recipe_of(name: str = "mae_ast_patch", *, refresh: int = 2, batch: int = 2, **data: Any) -> Recipe:
    recipe = find(name, "tiny")
    return replace(
        recipe,
        batch_size=batch,
        masking=SelfGuidedMasking(refresh_epochs=refresh),
        data=replace(recipe.data, **data),
    )


class Clips:
    """A manifest, as far as the cache reads it."""

    def __init__(self, samples: Sequence[int], rates: Sequence[int]) -> None:
        self.num_samples = np.array(samples, dtype=np.int64)
        self.sample_rate = np.array(rates, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.num_samples)


def cache_of(recipe: Recipe, samples: Sequence[int], rates: Sequence[int]) -> ScoreCache:
    clips: Any = Clips(samples, rates)
    return ScoreCache(recipe, clips, CPU)


class Feed:
    """Micro-batches of crops of a cache's clips, and scores that say which patch they are of."""

    def __init__(self, cache: ScoreCache, samples: Sequence[int], rates: Sequence[int]) -> None:
        self.cache, self.samples, self.rates = cache, samples, rates
        self.computed: list[tuple[int, ...]] = []

    def crop(self, clip: int, start: int) -> tuple[AudioBatch, TokenLayout]:
        return self.batch([(clip, start)])

    def batch(self, crops: Sequence[tuple[int, int]]) -> tuple[AudioBatch, TokenLayout]:
        recipe = self.cache.recipe
        rates = tuple(self.rates[clip] for clip, _ in crops)
        lengths = tuple(
            crop_length(self.samples[clip], rate, recipe.data.clip_seconds)
            for (clip, _), rate in zip(crops, rates, strict=True)
        )
        ids = torch.tensor([clip for clip, _ in crops])
        audio = AudioBatch(torch.zeros(0), lengths, rates, ids, torch.tensor([start for _, start in crops]))
        frames = tuple(recipe.frontend.frames_for(n, r) for n, r in zip(lengths, rates, strict=True))
        spectrogram = Spectrogram(torch.zeros(0, 1), frames, cumulative(frames, torch.int64, "cpu"), ids)
        return audio, recipe.grid.layout(spectrogram)

    def scores(self, step: int, *batches: tuple[AudioBatch, TokenLayout]) -> list[Tensor]:
        """Return the scores of the micro-batches of a step; `computed` gains the clips of each fresh call."""
        audio, layouts = [a for a, _ in batches], [layout for _, layout in batches]
        lookups = self.cache.lookups(step, audio, layouts)
        return [
            self.cache.scores(lookup, layout, self.fresh(a, layout))
            for lookup, a, layout in zip(lookups, audio, layouts, strict=True)
        ]

    def fresh(
        self, audio: AudioBatch, layout: TokenLayout
    ) -> Callable[[Sequence[int]], tuple[TokenLayout, Tensor]]:
        def compute(places: Sequence[int]) -> tuple[TokenLayout, Tensor]:
            self.computed.append(tuple(int(audio.clip_ids[place]) for place in places))
            crops = [(int(audio.clip_ids[p]), int(audio.starts[p])) for p in places]
            _, part = self.batch(crops)
            return part, torch.cat(
                [self.truth(clip, start, part, i) for i, (clip, start) in enumerate(crops)]
            )

        return compute

    def truth(self, clip: int, start: int, layout: TokenLayout, place: int) -> Tensor:
        """Scores that rise with the column of the file, and within it with the row: ranks then tell the patch."""
        column = column_samples(self.cache.recipe, self.rates[clip])
        first = round(start / column)
        columns, freq = layout.columns[place], layout.grid.freq
        cells = (torch.arange(columns)[:, None] + first) * freq + torch.arange(freq)
        return (cells if layout.grid.order == "time" else cells.T).flatten().float()


# --- crops on columns ---


@given(
    samples=st.integers(400, 10**7),
    rate=st.sampled_from([8000, 11025, 16000, 22050, 32000, 44100, 48000, 12345]),
    seconds=st.floats(0.2, 20),
    epoch=st.integers(0, 10**6),
)
def test_crops_begin_on_columns_and_their_columns_have_a_row_each(
    samples: int, rate: int, seconds: float, epoch: int
) -> None:
    recipe = recipe_of(clip_seconds=seconds)
    column = column_samples(recipe, rate)
    length = crop_length(samples, rate, seconds)
    start = crop_start(3, epoch, 1, samples, length, column)
    assert 0 <= start <= samples - length
    number = round(start / column)
    assert start == int(number * column)
    cache = cache_of(recipe, [samples, samples], [rate, rate])
    feed = Feed(cache, [samples, samples], [rate, rate])
    audio, layout = feed.crop(1, start)
    (lookup,) = cache.lookups(0, [audio], [layout])
    assert lookup.first[0] - cache.starts[1] == number
    assert lookup.first[0] + layout.columns[0] <= cache.ends[1]


def test_all_columns_are_begun_on_equally_often() -> None:
    column, draws = Fraction(2560), 3000
    starts = [crop_start(1, epoch, 4, 50_000, 20_000, column) for epoch in range(draws)]
    counts = np.bincount(np.array(starts) // 2560, minlength=12)
    assert len(counts) == 12
    assert ((counts - draws / 12) ** 2 / (draws / 12)).sum() < 37.4  # 11 degrees, by chance once in 10^4


# --- ranks ---


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5).map(tuple),
    levels=st.integers(1, 50),
    seed=st.integers(0, 10**6),
)
def test_the_largest_ranks_are_the_largest_scores(lengths: tuple[int, ...], levels: int, seed: int) -> None:
    """Ties included: of equal scores the lower token goes first, as in select_tokens."""
    grid = replace(find("mae_ast_frame", "tiny").grid, patch_time=1)
    spectrogram = Spectrogram(
        torch.zeros(0, 1), lengths, cumulative(lengths, torch.int64, "cpu"), torch.arange(len(lengths))
    )
    scores = torch.randint(levels, (sum(lengths),), generator=torch.Generator().manual_seed(seed)).float()
    found = ranks(grid.layout(spectrogram), scores)
    assert found.dtype == torch.uint8
    for ours, theirs in zip(found.split(list(lengths)), scores.split(list(lengths)), strict=True):
        order = np.lexsort((np.arange(len(theirs)), -theirs.numpy()))
        np.testing.assert_array_equal(np.argsort(-ours.numpy().astype(int), kind="stable"), order)
        assert len(set(ours.tolist())) == len(ours)


def test_ranks_of_a_long_clip_move_one_token_at_most() -> None:
    scores = torch.rand(512, generator=torch.Generator().manual_seed(0))
    grid = replace(find("mae_ast_frame", "tiny").grid, patch_time=1)
    spectrogram = Spectrogram(
        torch.zeros(0, 1), (512,), torch.tensor([0, 512]), torch.zeros(1, dtype=torch.int64)
    )
    found = ranks(grid.layout(spectrogram), scores)
    for ratio in (0.3, 0.7, 0.75, 0.8):
        masked = 512 - visible_count(512, ratio)
        exact = set(scores.argsort(descending=True)[:masked].tolist())
        kept = set(found.int().argsort(descending=True, stable=True)[:masked].tolist())
        assert len(exact - kept) <= 1


# --- what is kept ---

RATE, SECONDS = 16000, 0.98  # 96 frames: 6 columns
LONG, SHORT = 16000 * 3, 12000


@pytest.mark.parametrize("name", ["mae_ast_patch", "msm_mae"])
def test_scores_come_back_for_the_patches_they_were_computed_for(name: str) -> None:
    """Over both token orders, whole batches and parts of them: kept scores order the patches as fresh ones do."""
    recipe = recipe_of(name, clip_seconds=SECONDS)
    samples, rates = [LONG, SHORT, LONG], [RATE, RATE, 2 * RATE]
    cache = cache_of(recipe, samples, rates)
    feed = Feed(cache, samples, rates)
    column = int(column_samples(recipe, RATE))
    first = feed.batch([(0, 2 * column), (1, 0), (2, 4 * column)])
    (fresh,) = feed.scores(0, first)
    assert feed.computed == [(0, 1, 2)]
    (again,) = feed.scores(1, first)
    assert feed.computed == [(0, 1, 2)] and torch.equal(fresh, again)
    # one clip is due, and stands between two that are not
    (mixed,) = feed.scores(1, feed.batch([(1, 0), (0, 3 * column), (2, 4 * column)]))
    assert feed.computed == [(0, 1, 2), (0,)]
    layout = feed.batch([(1, 0), (0, 3 * column), (2, 4 * column)])[1]
    parts = mixed.split(list(layout.lengths))
    for place, (clip, start) in enumerate([(1, 0), (0, 3 * column), (2, 4 * column)]):
        truth = feed.truth(clip, start, layout, place)
        assert torch.equal(parts[place].argsort(stable=True), truth.argsort(stable=True))


def test_a_crop_between_two_that_are_known_takes_its_columns_from_both() -> None:
    recipe = recipe_of(clip_seconds=SECONDS)
    cache = cache_of(recipe, [LONG], [RATE])
    feed, column = Feed(cache, [LONG], [RATE]), 2560
    (left,) = feed.scores(0, feed.crop(0, 0))
    (right,) = feed.scores(0, feed.crop(0, 6 * column))
    (between,) = feed.scores(0, feed.crop(0, 3 * column))
    assert feed.computed == [(0,), (0,)]
    freq = recipe.grid.freq
    assert torch.equal(between, torch.cat([left[3 * freq :], right[: 3 * freq]]))
    feed.scores(0, feed.crop(0, 7 * column))
    assert len(feed.computed) == 3


def test_scores_are_due_anew_in_every_period_of_the_data_order() -> None:
    """4 clips, batches of 2, 3 epochs a period: 6 steps."""
    recipe = recipe_of(refresh=3, clip_seconds=SECONDS)
    samples, rates = [SHORT] * 4, [RATE] * 4
    feed = Feed(cache_of(recipe, samples, rates), samples, rates)
    due = []
    for step in range(15):
        before = len(feed.computed)
        feed.scores(step, feed.batch([(0, 0), (1, 0)] if step % 2 else [(2, 0), (3, 0)]))
        due.append(len(feed.computed) > before)
    assert [step for step, fresh in enumerate(due) if fresh] == [0, 1, 6, 7, 12, 13]


def test_nothing_is_known_that_was_not_computed() -> None:
    """Steps whose masks are random look the cache up, but ask for no scores."""
    recipe = recipe_of(clip_seconds=SECONDS)
    cache = cache_of(recipe, [SHORT], [RATE])
    feed = Feed(cache, [SHORT], [RATE])
    audio, layout = feed.crop(0, 0)
    cache.lookups(0, [audio], [layout])
    assert not cache.known.any()
    feed.scores(1, (audio, layout))
    assert cache.known.all() and feed.computed == [(0,)]


def test_a_clip_that_a_step_holds_twice_is_computed_twice_and_kept_once() -> None:
    """In one micro-batch or in two: the result is the same."""
    recipe = recipe_of(clip_seconds=SECONDS)
    kept = []
    crops = [(0, 0), (0, 2560)]
    for together in (True, False):
        cache = cache_of(recipe, [LONG], [RATE])
        feed = Feed(cache, [LONG], [RATE])
        batches = [feed.batch(crops)] if together else [feed.batch([crop]) for crop in crops]
        scores = torch.cat(feed.scores(0, *batches))
        kept.append((scores, cache.values.clone(), cache.known.copy()))
        assert sum(feed.computed, ()) == (0, 0)
    assert all(np.array_equal(a, b) for a, b in zip(*kept, strict=True))
    assert kept[0][2].sum() == 6


def test_a_checkpoint_restores_values_and_what_is_known() -> None:
    recipe = recipe_of(clip_seconds=SECONDS)
    cache = cache_of(recipe, [LONG, SHORT], [RATE, RATE])
    feed = Feed(cache, [LONG, SHORT], [RATE, RATE])
    feed.scores(9, feed.batch([(1, 0), (0, 2560)]))
    saved = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    state = json.loads(json.dumps(cache.state()))
    other = cache_of(recipe, [LONG, SHORT], [RATE, RATE])
    other.load(saved, state)
    assert torch.equal(other.values, cache.values) and (other.known == cache.known).all()
    resumed = Feed(other, [LONG, SHORT], [RATE, RATE])
    resumed.scores(9, resumed.batch([(1, 0), (0, 2560)]))
    assert resumed.computed == []
    for broken in ({**saved, "values": saved["values"][1:]}, {"values": saved["values"]}, {}):
        with pytest.raises(CheckpointError, match="kept scores"):
            other.load(broken, state)
    for odd in ({}, {"period": "1"}, {"period": -1}, []):
        with pytest.raises(CheckpointError, match="kept scores"):
            other.load(saved, odd)  # type: ignore[arg-type]


def test_a_clip_takes_a_byte_a_patch_and_one_a_column() -> None:
    recipe = recipe_of("msm_mae", clip_seconds=6.08)
    cache = cache_of(recipe, [160_000] * 100, [RATE] * 100)
    size = sum(tensor.nbytes for tensor in cache.tensors().values()) / 100
    assert 63 * 5 <= size <= 64 * 6


# --- where it cannot serve ---


@pytest.mark.parametrize(
    ("recipe", "world", "named"),
    [
        (recipe_of(), 2, "2 ranks"),
        (recipe_of(crop_to_batch_min=True), 1, "crop_to_batch_min"),
        (recipe_of(padding="reference", clip_seconds=20.0), 1, "target_length"),
        (recipe_of(padding="reference", clip_seconds=None), 1, "target_length"),
        (replace(recipe_of("audiomae"), augment=AugmentConfig(roll=True)), 1, "augment.roll"),
    ],
)
def test_what_moves_patches_is_refused(recipe: Recipe, world: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(recipe, world)
    check(replace(recipe, masking=SelfGuidedMasking()), world)


@pytest.mark.parametrize("padding", ["none", "reference"])
def test_what_keeps_them_in_place_is_not(padding: Any) -> None:
    recipe = recipe_of(padding=padding)
    assert isinstance(recipe.data, DataConfig) and score_cache.wanted(recipe)
    check(recipe, 1)


# --- a run ---


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    """Crops shorter than the clips, two micro-batches, a refresh on either side of the checkpoint."""
    clips = runs.make_clips(tmp_path / "audio", 24)
    arguments = [*runs.SMALL, "--data", str(clips), "--steps", "12", "--checkpoint-every", "6"]
    arguments += [
        "--masking",
        "self_guided",
        "--masking.hint.start-epoch",
        "25",
        "--masking.refresh-epochs",
        "2",
    ]
    arguments += ["--data.clip-seconds", "0.4", "--train.accumulation", "2", "--data.workers", "1"]
    whole, part = tmp_path / "whole", tmp_path / "part"
    run(["--recipe", "mae_ast_patch", *arguments, "--out", str(whole)])
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step_00000012")
    config = (part / "config.json").read_text()
    (part / "config.json").write_text(config.replace(str(whole), str(part)))
    run(["--resume", str(part)])
    assert runs.trace(part) == runs.trace(whole)
    ours, theirs = runs.tensors(part), runs.tensors(whole)
    assert ours == theirs
    known = np.frombuffer(ours["scores/known"], dtype=np.uint8)
    assert 0 < known.sum() < len(known)
    assert len(set(ours["scores/values"])) > 5
