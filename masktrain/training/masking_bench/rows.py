# SPDX-License-Identifier: Apache-2.0
"""What drawing the masks of a batch costs by each strategy, beside a whole training step of the same batch.

All strategies of a batch and the step itself are called in turn, round after round, so that a machine that slows down
slows all of them down, and their ratios stay. The step is the recipe's own: front end, its own masks, forward,
backward, update. Clips are synthetic sounds of one length, and the encoder is untrained.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from masktrain.data.manifest import Manifest
from masktrain.data.synth import KINDS, scene
from masktrain.kernels.ncut_scores import ncut_scores
from masktrain.masking.dispersion import DispersionMasking
from masktrain.masking.inverse_block import InverseBlockMasking
from masktrain.masking.registry import Strategy
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.masking.strategies import RandomMasking
from masktrain.masking.view import View
from masktrain.models import registry
from masktrain.training import optim, precision, schedule
from masktrain.training.distributed import World
from masktrain.training.masking_bench import published
from masktrain.training.measure import Stopwatch, Timing, timing
from masktrain.training.recipe import Recipe
from masktrain.training.score_cache import Lookup, ScoreCache
from masktrain.training.step import Step
from masktrain.training.step_view import StepView
from masktrain.types import AudioBatch, MaskPlan, Spectrogram, StepKey, TokenGrid, cumulative

Row = dict[str, Any]
Work = Callable[[], object]

STEP = "training_step"
EIGH_LOOP = partial(published.eigh_side, loop=True)
# The share of the run that lies behind: hint ratio 0.75 by the default schedule, so that masks are chosen and exchanged.
PROGRESS = 0.5
HORIZON = 1000  # steps of the run
# Between two refreshes of a clip's stored scores.
REFRESH_EPOCHS = 10
# A call that takes longer than this many seconds is measured once and not in the rounds.
SLOW = 4.0
GOALS = {"dispersion": 0.005, "inverse_block": 0.01, "self_guided_solver": 0.01, "self_guided_cached": 0.05}
"""Shares of a training step on a GPU that the strategies are to stay under."""


@dataclass(frozen=True)
class Size:
    """A published token grid and the recipes that have it. name: rows x columns as its papers write it."""

    name: str
    freq: int
    columns: int
    recipes: tuple[str, ...]


GRIDS = {
    size.name: size
    for size in (
        Size("5x38", 5, 38, ("msm_mae",)),
        Size("8x62", 8, 62, ("mae_ast_patch", "maskspec")),
        Size("64x8", 8, 64, ("audiomae",)),
    )
}
BATCHES = {"cpu": (1, 4, 8), "cuda": (32, 128, 512)}
# clips, width of the features, and tokens along time of 8 rows
SCALING = {"cpu": (4, 128, (16, 32, 64, 128)), "cuda": (64, 768, (16, 32, 64, 128, 256))}
FREQ = 8


def batch_sizes(device: torch.device) -> tuple[int, ...]:
    """Return the numbers of clips that are measured unless others are asked for."""
    return BATCHES[device.type]


def bench(size: Size, recipe: Recipe, watch: Stopwatch, clips: int, seconds: float) -> Iterator[Row]:
    """Yield the rows of a batch: of every strategy, and of the recipe's training step.

    seconds: for all of them; five rounds are measured even if they take longer. A row has strategy, grid, tokens,
    recipe, size, clips, status ("ok", "out of memory"), and where it is ok median_ms, p20_ms, p80_ms, n, clips_per_s,
    peak_memory_bytes, ratio_to_random and share_of_step; stored scores also share_of_step_with_refresh, with the
    feature passes that fill the store spread over the epochs between them.
    """
    try:
        batch = Batch(recipe, watch.device, clips, size.columns)
        works = batch.works()
    except torch.OutOfMemoryError:
        works = {}
    times, peaks = race(works, watch, seconds)
    common: Row = {
        "grid": size.name, "tokens": size.freq * size.columns, "recipe": recipe.name, "size": recipe.size,
        "mask_ratio": recipe.masking.mask_ratio, "clips": clips,
    }  # fmt: skip
    if works:
        common |= {"precision": batch.step.precision.name, "layers": batch.layers, "width": batch.width}
    for name in works or (STEP,):
        row: Row = {"strategy": name, **common}
        if name not in times:
            yield row | {"status": "out of memory"}
            continue
        row |= {"status": "ok", **_numbers(times[name], clips), "peak_memory_bytes": peaks[name]}
        if "random" in times:
            row["ratio_to_random"] = times[name].median / times["random"].median
        if STEP in times:
            row["share_of_step"] = times[name].median / times[STEP].median
        if name == "self_guided_cached" and "self_guided_fresh" in times:
            refresh = times["self_guided_fresh"].median / REFRESH_EPOCHS
            row |= {"refresh_epochs": REFRESH_EPOCHS, "with_refresh_ms": 1e3 * (times[name].median + refresh)}
            if STEP in times:
                row["share_of_step_with_refresh"] = (times[name].median + refresh) / times[STEP].median
        if name == "self_guided_early_layer":
            row["layer"] = early(batch.layers)
        if watch.device.type == "cuda" and name in GOALS:
            row["goal_share"] = GOALS[name]
        yield row


def _numbers(taken: Timing, clips: int) -> Row:
    row: Row = {f"{q}_ms": 1e3 * getattr(taken, q) for q in ("median", "p20", "p80")}
    return row | {"n": taken.n, "clips_per_s": clips / taken.median}


def race(
    works: dict[str, Work], watch: Stopwatch, seconds: float
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Return the time and the peak memory of each of `works` that fits into memory, measured in rounds."""
    fast: dict[str, Work] = {}
    times: dict[str, Timing] = {}
    peaks: dict[str, int] = {}
    for name, work in works.items():
        try:
            peaks[name] = peak_bytes(work, watch.device)
            begin = time.perf_counter()
            first = watch.once(work)()
            if time.perf_counter() - begin > SLOW:
                times[name] = timing([first])
            else:
                fast[name] = work
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return times | (watch.race(fast, seconds) if fast else {}), peaks


def peak_bytes(work: Work, device: torch.device) -> int:
    """Return the most bytes that torch's allocator gives out during one call, beyond those held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler's log ends up between the rows
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    results = recorded.profiler.kineto_results
    assert results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = np.cumsum([0, *(change for _, change in changes)])
    return int(held.max())


def early(layers: int) -> int:
    """Return the layer of the early features: a quarter of the way, 3 of 12."""
    return max(1, layers // 4)


class Batch:
    """A recipe with a batch that is ready on the device, and every way to draw its masks."""

    def __init__(self, recipe: Recipe, device: torch.device, clips: int, columns: int) -> None:
        """columns: tokens of each clip along time."""
        rate = recipe.frontend.sample_rate
        length = recipe.frontend.min_samples(rate, columns * recipe.tokens.patch_time)
        self.recipe = replace(
            recipe, batch_size=clips, data=replace(recipe.data, clip_seconds=length / rate, padding="none")
        )
        self.clips, self.columns = clips, columns
        torch.manual_seed(0)
        self.model = registry.build(recipe.model, recipe.grid, recipe.input_norm).to(device)
        lr = recipe.optim.peak_lr(clips)
        self.step = Step(
            self.recipe,
            self.model,
            optim.build(self.model, recipe.optim, lr),
            schedule.resolve(recipe.schedule, HORIZON, lr),
            World(0, 1, device, None),
            precision.choose(recipe.train.precision, device),
        )
        self.audio = sounds(clips, length, rate)
        self.key = StepKey.make(0, 0, device)
        self.spectrogram = self.step.spectrogram(self.audio)
        norm = self.model.input_norm
        sums = norm.statistics(self.spectrogram.frames) if norm.uses_batch else None
        self.mean, self.scale = norm.affine(sums)
        self.layout = recipe.grid.layout(self.spectrogram)
        assert set(self.layout.columns) == {columns}, (recipe.name, self.layout.columns)
        encoder = self.model.encoder.config
        self.layers, self.width = encoder.layers, encoder.width
        self.done = 0

    def works(self) -> dict[str, Work]:
        """Return the ways to draw masks and the training step, by name."""
        ratio = self.recipe.masking.mask_ratio
        guided = SelfGuidedMasking(mask_ratio=ratio)
        kept = replace(guided, refresh_epochs=REFRESH_EPOCHS)
        return {
            "random": partial(self._plan, RandomMasking(mask_ratio=ratio)),
            "inverse_block": partial(self._plan, InverseBlockMasking(mask_ratio=ratio)),
            "dispersion": partial(self._plan, DispersionMasking(mask_ratio=ratio)),
            "self_guided_solver": partial(
                ncut_scores, self.view().features(None), self.layout.cu_tokens, self.layout.lengths
            ),
            "self_guided_fresh": partial(self._plan, guided),
            "self_guided_early_layer": partial(self._plan, replace(guided, layer=early(self.layers))),
            "self_guided_cached": partial(self._plan, kept, self._cache(kept)),
            "self_guided_published_eigh": partial(self._published, guided, published.eigh_side),
            "self_guided_published_eigh_loop": partial(self._published, guided, EIGH_LOOP),
            "self_guided_published_pca": partial(self._published, guided, published.pca_side),
            "inverse_block_published_loop": partial(
                published.inverse_block_loop,
                self.clips, self.recipe.grid.freq, self.columns, ratio, self.spectrogram.frames.device,
            ),
            STEP: self._step,
        }  # fmt: skip

    def view(self, lookup: Lookup | None = None, cache: ScoreCache | None = None) -> StepView:
        """Return what a step in the middle of a run shows a strategy; it has computed nothing yet."""
        view = self.step.view(int(PROGRESS * HORIZON), self.spectrogram, self.mean, self.scale)
        return replace(view, lookup=lookup, cache=cache)

    def _plan(self, masking: Strategy, cache: ScoreCache | None = None) -> MaskPlan:
        lookup = cache.lookups(0, [self.audio], [self.layout])[0] if cache else None
        view = self.view(lookup, cache)
        if isinstance(masking, SelfGuidedMasking):
            view = replace(view, scores=masking.scores)
        return masking.plan(self.layout, self.key, 0, view)

    def _cache(self, masking: SelfGuidedMasking) -> ScoreCache:
        """Return a cache that holds the scores of this batch."""
        recipe = replace(self.recipe, masking=masking)
        cache = ScoreCache(recipe, manifest_of(self.audio), self.spectrogram.frames.device)
        self._plan(masking, cache)
        return cache

    def _published(self, ours: SelfGuidedMasking, bipartition: Callable[[Tensor], Tensor]) -> Tensor:
        """Draw the masks from the features of a full pass, as published; the pass itself is that of ours."""
        features = self.view().features(None).unflatten(0, (self.clips, -1))
        scores = published.centroid_scores(features, bipartition)
        return published.lowest_masked(scores, ours.mask_ratio, ours.hint.ratio(PROGRESS))

    def _step(self) -> object:
        self.done += 1
        return self.step(self.done % HORIZON, [self.audio])


def sounds(clips: int, length: int, rate: int) -> AudioBatch:
    """Return a batch of synthetic sounds of `length` samples each, of eight different ones."""
    kinds = [KINDS[i % len(KINDS)] for i in range(min(clips, 8))]
    waves = [scene(kind, np.random.default_rng(i), length, rate) for i, kind in enumerate(kinds)]
    samples = torch.from_numpy(np.concatenate(waves)).float()
    samples = samples.view(len(waves), length)[torch.arange(clips) % len(waves)]
    ids = torch.arange(clips)
    return AudioBatch(samples.flatten(), (length,) * clips, (rate,) * clips, ids, torch.zeros_like(ids))


def manifest_of(audio: AudioBatch) -> Manifest:
    """Return a manifest of the clips of a batch, each a whole file."""
    clips = len(audio.lengths)
    return Manifest(
        root="/",
        paths=[str(clip) for clip in range(clips)],
        num_samples=np.array(audio.lengths, dtype=np.int64),
        sample_rate=np.array(audio.sample_rates, dtype=np.int32),
        labels={},
        sources=(),
        source=np.zeros(clips, dtype=np.int32),
        rows=np.arange(clips),
    )


def scaling(watch: Stopwatch, seconds: float) -> Iterator[Row]:
    """Yield how the time of a batch grows with the tokens of a clip, the features given: clips of 8 rows and 16, 32, ...
    columns. seconds: for each length."""
    clips, width, all_columns = SCALING[watch.device.type]
    for columns in all_columns:
        works = scaling_works(clips, width, columns, watch.device)
        times, peaks = race(works, watch, seconds)
        for name, taken in times.items():
            yield {
                "strategy": name, "tokens": FREQ * columns, "clips": clips, "width": width,
                **_numbers(taken, clips), "peak_memory_bytes": peaks[name],
            }  # fmt: skip


def scaling_works(clips: int, width: int, columns: int, device: torch.device) -> dict[str, Work]:
    """Return what scales with the tokens of a clip alone, by name. width: of the features."""
    generator = torch.Generator().manual_seed(0)
    grid = TokenGrid(freq=FREQ, patch_freq=16, patch_time=16, order="freq")
    lengths = (16 * columns,) * clips
    frames = torch.randn(sum(lengths), 16 * FREQ, generator=generator)
    cu = cumulative(lengths, torch.int64, device)
    spectrogram = Spectrogram(frames.to(device), lengths, cu, torch.arange(clips, device=device))
    layout, key = grid.layout(spectrogram), StepKey.make(0, 0, device)
    view = View(PROGRESS, spectrogram, torch.zeros(1, device=device), torch.ones(1, device=device))
    # three directions in each clip, and noise: tokens that belong together, as those of an encoder
    tokens = layout.lengths[0]
    centres = torch.randn(clips, 3, width, generator=generator)
    member = torch.randint(3, (clips, tokens), generator=generator)
    noise = torch.randn(clips, tokens, width, generator=generator)
    features = (centres.take_along_dim(member[..., None], 1) + noise).to(device)

    def plan(masking: Strategy) -> Work:
        return lambda: masking.plan(layout, key, 0, view)

    return {
        "random": plan(RandomMasking()),
        "inverse_block": plan(InverseBlockMasking(mask_ratio=0.75)),
        "dispersion": plan(DispersionMasking()),
        "self_guided_solver": partial(ncut_scores, features.flatten(0, 1), layout.cu_tokens, layout.lengths),
        "self_guided_published_eigh": partial(published.centroid_scores, features, published.eigh_side),
        "self_guided_published_eigh_loop": partial(published.centroid_scores, features, EIGH_LOOP),
        "self_guided_published_pca": partial(published.centroid_scores, features, published.pca_side),
    }


def exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return by strategy the exponent a of time ~ tokens^a between the two longest clips of `scaling`."""
    found = {}
    for name in dict.fromkeys(row["strategy"] for row in rows):
        last = sorted((r["tokens"], r["median_ms"]) for r in rows if r["strategy"] == name)[-2:]
        if len(last) == 2:
            (n0, t0), (n1, t1) = last
            found[name] = math.log(t1 / t0) / math.log(n1 / n0)
    return found
