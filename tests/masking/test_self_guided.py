# SPDX-License-Identifier: Apache-2.0
"""Self-guided masks: the top set without hints, random with all of them, exact counts, and nothing computed in vain."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from masktrain.errors import ConfigError
from masktrain.masking.hint import HintConfig
from masktrain.masking.plan import check_plan, visible_count
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.masking.strategies import RandomMasking
from masktrain.masking.view import View
from masktrain.types import Spectrogram, StepKey, TokenGrid, TokenLayout, cumulative

WIDTH = 24


@dataclass(frozen=True)
class Given(View):
    """A view of features, or of stored scores, that counts what is asked of it."""

    rows: Tensor = field(default_factory=lambda: torch.zeros(0, WIDTH))
    stored: Tensor | None = None
    asked: list[int | None] = field(default_factory=list)

    def features(self, layer: int | None) -> Tensor:
        self.asked.append(layer)
        return self.rows

    def stored_scores(self) -> Tensor | None:
        return self.stored


def layout_of(columns: tuple[int, ...], freq: int = 5, order: str = "time") -> TokenLayout:
    grid = TokenGrid(freq=freq, patch_freq=4, patch_time=4, order=order)  # type: ignore[arg-type]
    lengths = tuple(4 * c for c in columns)
    frames = torch.zeros(sum(lengths), 4 * freq)
    ids = torch.arange(10, 10 + len(columns))
    return grid.layout(Spectrogram(frames, lengths, cumulative(lengths, torch.int64, "cpu"), ids))


def two_groups(layout: TokenLayout, seed: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Return features of two directions in each clip with noise, and which tokens are of the second, the smaller."""
    generator = torch.Generator().manual_seed(seed)
    rows, member = [], []
    for n in layout.lengths:
        centres = torch.linalg.qr(torch.randn(WIDTH, 2, generator=generator))[0].T
        second = torch.zeros(n, dtype=torch.bool)
        second[torch.randperm(n, generator=generator)[: n // 4]] = True
        # both share a direction, as tokens of one clip do
        x = centres[second.long()] + 0.5 * centres.sum(0)
        rows.append(x + noise * torch.randn(n, WIDTH, generator=generator) / WIDTH**0.5)
        member.append(second)
    return torch.cat(rows), torch.cat(member)


def view_of(layout: TokenLayout, progress: float, **values: Any) -> Given:
    frames = torch.zeros(0, 1)
    spectrogram = Spectrogram(frames, (), layout.cu_frames, layout.clip_ids)
    return Given(progress, spectrogram, torch.zeros(1), torch.ones(1), **values)


def key(step: int = 0) -> StepKey:
    return StepKey.make(5, step, "cpu")


def local(layout: TokenLayout, ids: Tensor) -> list[set[int]]:
    """Return the tokens of each clip, counted from its first."""
    out, start, numbers = [], 0, ids.tolist()
    for n in layout.lengths:
        out.append({t - start for t in numbers if start <= t < start + n})
        start += n
    return out


NO_HINT = HintConfig(abs_hint_ratio=0.0)


def test_the_smaller_of_two_groups_is_masked_by_the_paper_and_stays_by_the_code() -> None:
    """With M the size of the group: its members are the relevant ones, and outliers of neither side."""
    layout = layout_of((16, 9, 20))
    rows, second = two_groups(layout, 3)
    masking = SelfGuidedMasking(mask_ratio=0.25, hint=NO_HINT)
    masked = masking.plan(layout, key(), 0, view_of(layout, 0.0, rows=rows)).masked
    hit = second[masked.long()].float().mean()
    assert hit > 0.9
    code = replace(masking, rule="s1_code").plan(layout, key(), 0, view_of(layout, 0.0, rows=rows)).masked
    assert second[code.long()].float().mean() < 0.5


def test_without_hints_the_mask_is_the_top_set_of_the_scores() -> None:
    layout = layout_of((16, 9, 1), freq=8)
    rows, _ = two_groups(layout, 1, noise=1.0)
    for rule in ("paper", "s1_code"):
        masking = SelfGuidedMasking(mask_ratio=0.6, rule=rule, hint=NO_HINT)  # type: ignore[arg-type]
        view = view_of(layout, 0.5, rows=rows)
        scores = masking.scores(layout, view)
        plan = masking.plan(layout, key(), 0, view)
        check_plan(plan)
        start = 0
        for n, masked in zip(layout.lengths, local(layout, plan.masked), strict=True):
            order = torch.argsort(scores[start : start + n], descending=True, stable=True).tolist()
            assert masked == set(order[: n - visible_count(n, 0.6)])
            start += n


def test_at_hint_one_the_mask_is_random_and_no_features_are_asked_for() -> None:
    layout = layout_of((16, 9))
    random = RandomMasking(mask_ratio=0.7)
    for hint in (HintConfig(abs_hint_ratio=1.0), HintConfig(start_epoch=50, epochs=300)):
        masking = SelfGuidedMasking(mask_ratio=0.7, hint=hint)
        for draw in (0, 1):
            view = view_of(layout, 49 / 300)
            assert torch.equal(
                masking.plan(layout, key(2), draw, view).masked, random.plan(layout, key(2), draw).masked
            )
            assert view.asked == []


@given(
    columns=st.lists(st.integers(0, 12), min_size=1, max_size=4).map(tuple),
    freq=st.integers(1, 6),
    order=st.sampled_from(["time", "freq"]),
    ratio=st.floats(0.01, 0.99),
    hint=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(["paper", "s1_code"]),
)
def test_counts_and_partition_hold_for_any_grid_and_ratio(
    columns: tuple[int, ...], freq: int, order: str, ratio: float, hint: float, seed: int, rule: Any
) -> None:
    layout = layout_of(columns, freq, order)
    rows = torch.randn(sum(layout.lengths), WIDTH, generator=torch.Generator().manual_seed(seed))
    rows[::3] = 0  # silence
    masking = SelfGuidedMasking(mask_ratio=ratio, rule=rule, hint=HintConfig(abs_hint_ratio=hint))
    plan = masking.plan(layout, key(seed % 97), 0, view_of(layout, 0.3, rows=rows))
    check_plan(plan)
    assert plan.n_visible == tuple(visible_count(n, ratio) for n in layout.lengths)


def test_hints_exchange_their_share_and_draws_differ_by_hints_alone() -> None:
    layout = layout_of((38,) * 40)
    rows, _ = two_groups(layout, 2)
    masking = SelfGuidedMasking(mask_ratio=0.7, hint=HintConfig(abs_hint_ratio=0.5))
    view = view_of(layout, 0.0, rows=rows)
    first = replace(masking, hint=NO_HINT).plan(layout, key(), 0, view)
    drawn = [masking.plan(layout, key(), draw, view).masked for draw in (0, 1)]
    assert not torch.equal(*drawn)
    assert torch.equal(first.masked, replace(masking, hint=NO_HINT).plan(layout, key(7), 1, view).masked)
    # of M masked, M - h stay and h come from the other L - M + h: a share of h / (L - M + h) of those was masked
    n, m = 190, 133
    h = m // 2
    kept = (m - h + h * h / (n - m + h)) / m
    overlaps = [
        len(a & b) / m for a, b in zip(local(layout, first.masked), local(layout, drawn[0]), strict=True)
    ]
    assert sum(overlaps) / len(overlaps) == pytest.approx(kept, abs=0.015)


def test_masks_follow_the_counter_tensor() -> None:
    """What a captured step replays: the same call, with the counter changed in place."""
    layout = layout_of((16,) * 3)
    rows, _ = two_groups(layout, 4)
    masking, view = SelfGuidedMasking(hint=HintConfig(abs_hint_ratio=0.3)), view_of(layout, 0.0, rows=rows)
    held = key(0)
    before = masking.plan(layout, held, 0, view).masked
    held.counter[1] = 9
    assert torch.equal(
        masking.plan(layout, held, 0, view).masked, masking.plan(layout, key(9), 0, view).masked
    )
    assert not torch.equal(before, masking.plan(layout, key(9), 0, view).masked)


def test_stored_scores_serve_in_the_place_of_features() -> None:
    layout = layout_of((16, 4))
    scores = torch.rand(sum(layout.lengths), generator=torch.Generator().manual_seed(0))
    view = view_of(layout, 0.0, stored=scores)
    masked = SelfGuidedMasking(mask_ratio=0.5, hint=NO_HINT).plan(layout, key(), 0, view).masked
    assert view.asked == []
    for part, masked_part in zip(scores.split(list(layout.lengths)), local(layout, masked), strict=True):
        assert masked_part == set(part.argsort(descending=True)[: len(part) // 2].tolist())


def test_the_layer_is_passed_on() -> None:
    layout = layout_of((4,))
    rows, _ = two_groups(layout, 0)
    view = view_of(layout, 0.0, rows=rows)
    for layer in (3, None):
        SelfGuidedMasking(layer=layer, hint=NO_HINT).plan(layout, key(), 0, view)
    assert view.asked == [3, None]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"rule": "both"}, "paper, s1_code"),
        ({"bipartition": "kmeans"}, "ncut, pca, unnormalised"),
        ({"layer": 0}, "counted from 1"),
        ({"layer": True}, "counted from 1"),
        ({"refresh_epochs": -1}, "refresh_epochs"),
        ({"refresh_epochs": 1.5}, "refresh_epochs"),
    ],
)
def test_values_that_mean_nothing_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SelfGuidedMasking(**values)
