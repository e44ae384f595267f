# SPDX-License-Identifier: Apache-2.0
"""Dispersion-weighted masks: the weights, the frequencies they give, hints from one end to the other, silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import batch, key, shown
from scipy import stats

from masktrain.errors import ConfigError
from masktrain.masking import DispersionMasking, HintConfig, RandomMasking, check_plan
from masktrain.masking.view import View

CHOSEN = HintConfig(abs_hint_ratio=0.0)


@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("patch", [1, 2, 4])
def test_weights_against_float64(order: str, patch: int) -> None:
    layout, view = batch([5, 0, 3], 3, order, patch=patch)
    view = replace(view, mean=torch.tensor([0.3]), scale=torch.tensor([0.7]))
    patches = []
    for clip in range(3):
        x = (view.spectrogram.clip(clip).double() - 0.3) * 0.7
        cut = x.view(-1, patch, 3, patch).permute(0, 2, 1, 3).reshape(-1, 3, patch * patch)
        patches.append((cut if order == "time" else cut.transpose(0, 1)).reshape(-1, patch * patch))
    x = torch.cat(patches)
    mad = (x - x.mean(1, keepdim=True)).abs().mean(1)
    got = DispersionMasking(weight="mad").scores(layout, view)
    assert got.dtype == torch.float32 and (got - mad).abs().max() <= 1 / 1024
    variance = x.var(1) if patch > 1 else torch.zeros(len(x))
    assert (DispersionMasking(weight="variance").scores(layout, view) - variance).abs().max() < 1e-5


def drawn_one_by_one(weights: np.ndarray, masked: int, draws: int, seed: int) -> np.ndarray:
    """(draws, n) bool: tokens drawn without replacement, each time in proportion to the weights left. float64."""
    rng = np.random.default_rng(seed)
    left = np.tile(weights, (draws, 1))
    rows = np.arange(draws)
    for _ in range(masked):
        ends = left.cumsum(1)
        at = (rng.random((draws, 1)) * ends[:, -1:] >= ends).sum(1)
        left[rows, at] = 0
    return left == 0


@pytest.mark.parametrize("hint", [0.0, 0.5])
def test_frequencies_against_an_independent_sampler(hint: float) -> None:
    """Tokens and pairs of them are masked as often as by drawing one by one, then exchanging."""
    draws, columns, freq = 12000, 6, 4
    n, masked = columns * freq, 15
    _, view = batch([columns], freq, patch=4)
    one, _ = batch([columns], freq, patch=4)
    masking = DispersionMasking(mask_ratio=0.61, hint=HintConfig(abs_hint_ratio=hint))
    weights = masking.scores(one, view)
    many, whole = batch([columns] * draws, freq, patch=4, frames=view.spectrogram.frames.repeat(draws, 1))
    hidden = ~shown(masking.plan(many, key(), view=whole)).view(draws, n)
    assert (hidden.sum(1) == masked).all()

    theirs = torch.from_numpy(drawn_one_by_one(weights.double().numpy(), masked, draws, 7))
    h, rng = int(masked * hint), np.random.default_rng(8)
    for row in theirs.numpy() if h else ():
        stay = rng.permutation(np.flatnonzero(row))[: masked - h]
        others = np.setdiff1d(np.arange(n), stay)
        row[:] = False
        row[stay] = row[rng.permutation(others)[:h]] = True
    for a, b in (
        (hidden.double().mean(0), theirs.double().mean(0)),
        (hidden.double().T @ hidden.double() / draws, theirs.double().T @ theirs.double() / draws),
    ):
        pooled = (a + b) / 2
        z = (a - b) / (2 * pooled * (1 - pooled) / draws).sqrt().clamp(min=1e-9)
        assert float(z.abs().max()) < 5
        assert float((z**2).mean()) < 1.5
    # The test tells weighted from uniform.
    assert hint or float((theirs.double().mean(0) - masked / n).abs().max()) > 0.05


class Blind(View):
    """A view whose batch must not be looked at."""

    def __getattribute__(self, name: str) -> object:
        assert name not in ("spectrogram", "mean", "scale")
        return super().__getattribute__(name)


@pytest.mark.parametrize("weight", ["mad", "variance"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_hint_1_is_random_and_looks_at_nothing(weight: str, deterministic: bool) -> None:
    layout, view = batch([30, 7, 1], 4)
    blind = Blind(0.1, view.spectrogram, view.mean, view.scale)
    random = RandomMasking(mask_ratio=0.7).plan(layout, key(5), 2)
    for hint in (HintConfig(abs_hint_ratio=1.0), HintConfig(start_epoch=50)):
        masking = DispersionMasking(mask_ratio=0.7, weight=weight, deterministic=deterministic, hint=hint)
        plan = masking.plan(layout, key(5), 2, blind)
        assert torch.equal(plan.visible, random.visible) and torch.equal(plan.masked, random.masked)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.floats(0.01, 0.99),
    st.sampled_from(["mad", "variance"]),
)
@settings(max_examples=60, deadline=None)
def test_hint_0_deterministic_is_the_top_set(columns: list[int], ratio: float, weight: str) -> None:
    layout, view = batch(columns, 3, patch=2)
    masking = DispersionMasking(mask_ratio=ratio, weight=weight, deterministic=True, hint=CHOSEN)
    plan = masking.plan(layout, key(), view=view)
    scores = masking.scores(layout, view)
    for part, hidden in zip(
        scores.split(list(layout.lengths)), (~shown(plan)).split(list(layout.lengths)), strict=True
    ):
        count = int(hidden.sum())
        top = part.argsort(descending=True, stable=True)[:count]
        assert set(top.tolist()) == set(hidden.nonzero().flatten().tolist())


def test_silence_stays_visible_and_is_itself_uniform() -> None:
    """Constant patches are masked only when nothing else is left, and among them the choice is uniform."""
    draws, columns, freq, patch = 3000, 8, 2, 4
    frames = torch.randn(columns * patch, freq * patch, generator=torch.Generator().manual_seed(1))
    frames[: 5 * patch] = -11.5
    many, view = batch([columns] * draws, freq, patch=patch, frames=frames.repeat(draws, 1))
    plan = DispersionMasking(mask_ratio=0.25, hint=CHOSEN).plan(many, key(), view=view)
    v = shown(plan).view(draws, columns * freq)
    # 4 of 6 tokens with content are masked, and no silent one.
    assert v[:, :10].all() and (v[:, 10:].sum(1) == 2).all()
    v = shown(DispersionMasking(mask_ratio=0.75, hint=CHOSEN).plan(many, key(), view=view)).view(draws, -1)
    assert not v[:, 10:].any() and (v.sum(1) == 4).all()
    counts = v[:, :10].sum(0).double()
    p = 0.4
    chi2 = float(((counts - draws * p) ** 2).sum() / (draws * p * (1 - p)) * 9 / 10)
    assert 1e-4 < stats.chi2.sf(chi2, 9) < 1 - 1e-4


@pytest.mark.parametrize("value", [0.0, -11.5, float("nan"), float("-inf")])
@pytest.mark.parametrize("weight", ["mad", "variance"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_constant_clips_keep_their_counts(value: float, weight: str, deterministic: bool) -> None:
    frames = torch.full((11 * 2, 6), value)
    layout, view = batch([6, 5], 3, patch=2, frames=frames)
    masking = DispersionMasking(weight=weight, deterministic=deterministic, hint=CHOSEN)
    plan = masking.plan(layout, key(), view=view)
    check_plan(plan)
    assert plan.n_visible == (4, 3)


def test_what_is_louder_by_a_factor_has_the_same_mask() -> None:
    """Sampling sees ratios of weights alone: exact for a power of two."""
    layout, view = batch([40, 17], 4, patch=2)
    masking = DispersionMasking(hint=CHOSEN)
    frames = view.spectrogram.frames.mul(64).round().div(64)
    plans = [
        masking.plan(layout, key(), view=replace(view, spectrogram=replace(view.spectrogram, frames=f)))
        for f in (frames, frames * 2)
    ]
    assert torch.equal(plans[0].visible, plans[1].visible)


def test_masks_of_real_clips_differ_from_random(data_dir: Path) -> None:
    """On a recording, what is masked has larger weights than what stays."""
    soundfile = pytest.importorskip("soundfile")
    files = sorted((data_dir / "esc10").rglob("*.ogg"))[:4]
    if not files:
        pytest.skip(f"no clips under {data_dir / 'esc10'}")
    parts = []
    for file in files:
        wave, _ = soundfile.read(file, dtype="float32", always_2d=True)
        power = torch.stft(
            torch.from_numpy(wave.mean(1)), 512, 1024, window=torch.hann_window(512), return_complex=True
        ).abs()[:64, :208]
        parts.append((power.square() + 1e-7).log().T)
    layout, view = batch([13] * len(parts), 4, patch=16, frames=torch.cat(parts))
    scale = 1 / view.spectrogram.frames.std().reshape(1)
    view = replace(view, mean=view.spectrogram.frames.mean().reshape(1), scale=scale)
    for weight in ("mad", "variance"):
        masking = DispersionMasking(weight=weight, hint=CHOSEN)
        scores = masking.scores(layout, view).view(len(parts), -1)
        seen = torch.stack(
            [shown(masking.plan(layout, key(), draw, view)).view_as(scores) for draw in range(300)]
        ).double()
        rate = 1 - seen.mean(0)
        for clip in range(len(parts)):
            rank = stats.spearmanr(scores[clip], rate[clip]).statistic
            assert rank > 0.5, (files[clip], weight, rank)


def test_options() -> None:
    with pytest.raises(ConfigError, match=r"masking\.weight: 'std' is not known; allowed: mad, variance"):
        DispersionMasking(weight="std")
    layout, _ = batch([4])
    with pytest.raises(ValueError, match="needs a view"):
        DispersionMasking().plan(layout, key())
