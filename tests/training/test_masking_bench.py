# SPDX-License-Identifier: Apache-2.0
"""The masking benchmark: the published ways compute what the published code recorded, and its numbers are what they say."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from masktrain.masking.plan import check_plan
from masktrain.recipes import find
from masktrain.training.masking_bench import picture, published, rows
from masktrain.training.masking_bench.rows import GRIDS, STEP, Batch
from masktrain.training.measure import Stopwatch
from masktrain.types import MaskPlan

CPU = torch.device("cpu")


def masked_of(ids: Tensor, visible: int) -> Tensor:
    """(B, L) bool, True where masked, of (B, L) token numbers."""
    masked = torch.ones(ids.shape, dtype=torch.bool)
    return masked.scatter_(1, ids[:, :visible], False)


# --- the published ways against what the published code recorded ---


@pytest.mark.parametrize("case", ["m2d_pos", "m2d_signed", "wide_pos", "wide_signed"])
@pytest.mark.parametrize("loop", [False, True])
def test_eigh_reproduces_the_recorded_masks(golden_dir: Path, case: str, loop: bool) -> None:
    stored = np.load(golden_dir / "masking" / "A_sgim.npz")
    recorded = {k.split("/")[1]: v for k, v in stored.items() if k.startswith(f"{case}/spectral")}
    features = torch.from_numpy(stored[f"{case}/features_x1024"]).float() / 1024
    # where the eigenvector is well defined in float32 and no entry is near 0, the partition is
    firm = (recorded["spectral_float64_cos"] > 0.9999) & (recorded["spectral_min_abs_entry"] > 1e-5)
    assert firm.sum() >= 2
    side, theirs = published.eigh_side(features, loop=loop).numpy(), recorded["spectral_side"]
    equal = (side == theirs).mean(1)
    assert (np.maximum(equal, 1 - equal)[firm] == 1).all()
    scores = published.centroid_scores(features, partial(published.eigh_side, loop=loop))
    np.testing.assert_allclose(scores.numpy()[firm], recorded["spectral_score"][firm], atol=2e-6)
    for name in (n for n in recorded if n.startswith("spectral_mask_r")):
        ratio = int(name[-2:]) / 100
        tokens = scores.shape[1]
        masked = masked_of(published.lowest_masked(scores, ratio, 0.0), int(tokens * (1 - ratio))).numpy()
        ordered = np.sort(recorded["spectral_score"], axis=1)
        count = tokens - int(tokens * (1 - ratio))
        apart = ordered[:, count] - ordered[:, count - 1] > 5e-6
        assert (masked == recorded[name])[firm & apart].all()
        assert (masked.sum(1) == count).all()


@pytest.mark.parametrize("case", ["m2d_pos", "m2d_signed"])
def test_randomised_pca_is_as_far_from_the_exact_one_as_recorded(golden_dir: Path, case: str) -> None:
    stored = np.load(golden_dir / "masking" / "A_sgim.npz")
    features = torch.from_numpy(stored[f"{case}/features_x1024"]).float() / 1024
    x = torch.nn.functional.normalize(features, dim=-1)
    side = published.above_mean(x, torch.from_numpy(stored[f"{case}/pca_direction"])[..., None])
    firm = stored[f"{case}/pca_margin"] > 1e-6
    assert firm.sum() >= 2 and (side.numpy() == stored[f"{case}/pca_side"])[firm].all()
    exact = torch.from_numpy(stored[f"{case}/pca_exact_mask_r70"])
    torch.manual_seed(0)
    calls, overlaps = 40, []
    for _ in range(calls):
        scores = published.centroid_scores(features, published.pca_side)
        masked = masked_of(published.lowest_masked(scores, 0.7, 0.0), 57)
        overlaps.append((masked & exact).sum(1) / exact.sum(1))
    mean, low, high = stored[f"{case}/pca_seed_overlap"]
    # the recorded ranges are those of 200 calls: a standard deviation is below a half of them
    error = (high - low) / 2 / calls**0.5
    assert (np.abs(torch.stack(overlaps).mean(0).numpy() - mean) < 4 * error + 1e-3).all()


@pytest.mark.parametrize(
    "case", ["eat_64x8_b5_r80", "eat_large_64x8_b5_r75", "m2d_5x38_b5_r70", "m2d_5x38_b5_r75"]
)
def test_host_loop_has_the_recorded_rates(golden_dir: Path, case: str) -> None:
    stored = np.load(golden_dir / "masking" / "A_block.npz")
    made = json.loads((golden_dir / "masking" / "A_block.json").read_text())["settings"][case]
    (rows, columns), ratio, side = made["grid"], made["mask_prob"], made["mask_length"]
    draws, generator = 4000, torch.Generator().manual_seed(5)
    ids = published.inverse_block_loop(
        draws, rows, columns, ratio, CPU, side=side, adjust=made["mask_prob_adjust"], generator=generator
    )
    visible = int(rows * columns * (1 - ratio))
    assert [visible] == stored[f"{case}/visible_count_hist"][0].tolist()
    ours = (~masked_of(ids, visible)).double().mean(0).numpy()
    z = two_sample_z(ours, draws, stored[f"{case}/visible_rate"], int(stored[f"{case}/n"]))
    # about a chi-square of one less than the tokens, whose cells are negatively correlated through the fixed count
    assert np.abs(z).max() < 5 and (z**2).mean() < 1.5
    count = int(rows * columns * ((1 - ratio + made["mask_prob_adjust"]) / side**2))
    blocks = published.block_cells(draws, rows, columns, count, side, generator)
    marked = torch.zeros(draws, rows * columns).scatter_(1, blocks, 1.0)
    z = two_sample_z(marked.double().mean(0).numpy(), draws, stored[f"{case}/block_rate"], 100_000)
    assert np.abs(z).max() < 5
    sizes, times = stored[f"{case}/block_count_hist"]
    mean = float((sizes * times).sum() / times.sum())
    covered = marked.sum(1).double()
    assert abs(float(covered.mean()) - mean) < 4 * float(covered.std()) / draws**0.5


def two_sample_z(ours: np.ndarray, draws: int, theirs: np.ndarray, n: int) -> np.ndarray:
    """z of the differences of two rates, cell by cell."""
    pooled = (ours * draws + theirs * n) / (draws + n)
    return (ours - theirs) / np.sqrt(np.maximum(pooled * (1 - pooled), 1e-12) * (1 / draws + 1 / n))


def test_published_hint_exchange_has_its_two_rates() -> None:
    """At hint 0.5 a patch of the first mask stays masked with (M - h + h p) / M, another is masked with p."""
    tokens, draws, ratio, hint = 60, 20_000, 0.75, 0.5
    scores = torch.arange(tokens).float().expand(draws, tokens)
    ids = published.lowest_masked(scores, ratio, hint, torch.Generator().manual_seed(0))
    masked = masked_of(ids, 15).double()
    assert (masked.sum(1) == 45).all()
    h = int(45 * hint)
    p = h / (15 + h)  # of being drawn among the visible and the revealed
    first = (45 - h + h * p) / 45
    for rate, expected in ((masked[:, :45].mean(0), first), (masked[:, 45:].mean(0), p)):
        error = (expected * (1 - expected) / draws) ** 0.5
        assert (rate - expected).abs().max() < 5 * error


# --- the ways that are timed, and their numbers ---


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Batch(find("msm_mae", "tiny"), CPU, 2, 38)


def test_every_way_draws_masks_of_the_published_counts(batch: Batch) -> None:
    """47 of 190 visible at 0.75; each work is what its name says, and looks at no more of the encoder than that."""
    asked: list[tuple[int, ...]] = []
    encoded = batch.model.encoded

    def watched(spectrogram, plan, mean, scale, layers):  # type: ignore[no-untyped-def]
        asked.append(tuple(layers))
        assert plan.n_masked == (0, 0)
        return encoded(spectrogram, plan, mean, scale, layers)

    works = batch.works()
    batch.model.encoded = watched  # type: ignore[method-assign]
    try:
        for name, work in works.items():
            asked.clear()
            drawn = work()
            last = name == "self_guided_fresh" or name.startswith("self_guided_published")
            expected = [(6,)] if last else [(1,)] if name == "self_guided_early_layer" else []
            assert asked == expected, name
            if isinstance(drawn, MaskPlan):
                check_plan(drawn)
                assert drawn.n_visible == (47, 47), name
            elif "published" in name:
                assert isinstance(drawn, Tensor)
                assert drawn.sort(dim=1).values.tolist() == [list(range(190))] * 2, name
    finally:
        del batch.model.encoded
    # ranks of 190 tokens in 256ths keep their order: stored scores choose the masks that fresh ones choose
    fresh, kept = works["self_guided_fresh"](), works["self_guided_cached"]()
    assert isinstance(fresh, MaskPlan) and isinstance(kept, MaskPlan)
    assert fresh.masked.tolist() == kept.masked.tolist()


@pytest.mark.parametrize("name", ["8x62", "64x8"])
def test_grids_have_the_tokens_of_their_names(name: str) -> None:
    for recipe in GRIDS[name].recipes:
        assert Batch(find(recipe, "tiny"), CPU, 1, GRIDS[name].columns).layout.lengths == (
            {"8x62": 496, "64x8": 512}[name],
        )


def test_rows_agree_with_each_other() -> None:
    found = {
        row["strategy"]: row
        for row in rows.bench(GRIDS["5x38"], find("msm_mae", "tiny"), Stopwatch(CPU), 1, 0.0)
    }
    assert set(found) == {*picture.LABELS, STEP}
    step, random = found[STEP], found["random"]
    for row in found.values():
        assert row["status"] == "ok" and row["n"] >= 5
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["clips_per_s"] == pytest.approx(1e3 / row["median_ms"])
        assert row["ratio_to_random"] == pytest.approx(row["median_ms"] / random["median_ms"])
        assert row["share_of_step"] == pytest.approx(row["median_ms"] / step["median_ms"])
    # 190 x 190 cosines, the Laplacian, its vectors, in float32
    assert found["self_guided_published_eigh"]["peak_memory_bytes"] > 3 * 190 * 190 * 4
    # a few words for each token, and nothing for each pair of them
    assert found["random"]["peak_memory_bytes"] < 190 * 190
    cached = found["self_guided_cached"]
    with_refresh = cached["median_ms"] + found["self_guided_fresh"]["median_ms"] / cached["refresh_epochs"]
    assert cached["share_of_step_with_refresh"] == pytest.approx(with_refresh / step["median_ms"])


def test_peak_memory_is_what_one_call_needs_at_once() -> None:
    x = torch.ones(1000)

    def work() -> Tensor:
        a = x + 1
        b = a + 1
        del a
        return b + 1

    assert 8000 <= rows.peak_bytes(work, CPU) <= 8000 + 256


def test_exponents_are_those_of_the_longest_clips() -> None:
    grown = [{"strategy": "a", "tokens": n, "median_ms": 5 + n**2} for n in (128, 1 << 20, 1 << 21)]
    assert rows.exponents([*grown, {"strategy": "b", "tokens": 128, "median_ms": 1.0}]) == {
        "a": pytest.approx(2)
    }


def report() -> dict[str, object]:
    """Two recipes with shares of 2 % times the place of a strategy, twice that in the second; and their growth."""
    made = []
    for i, (recipe, grid) in enumerate((("msm_mae", "5x38"), ("maskspec", "8x62"))):
        for place, name in enumerate([*picture.LABELS, STEP]):
            share = 1.0 if name == STEP else 0.02 * (place + 1) * (1 + i)
            row = {
                "strategy": name,
                "recipe": recipe,
                "grid": grid,
                "clips": 8,
                "size": "tiny",
                "status": "ok",
            }
            row |= {"precision": "fp32", "share_of_step": share}
            if name == "self_guided_cached":
                row |= {"share_of_step_with_refresh": 0.5, "refresh_epochs": 10}
            made += [row, {**row, "clips": 1, "share_of_step": 50.0}]
    made.append({"strategy": "dispersion", "recipe": "maskspec", "clips": 64, "status": "out of memory"})
    grown = [
        {"strategy": name, "tokens": n, "median_ms": n**2, "clips": 4, "width": 16}
        for name in ("random", "self_guided_solver")
        for n in (128, 256)
    ]
    return {"made_with": {"device": "a machine", "threads": 1}, "rows": made, "scaling": grown}


def test_picture_shows_the_medians_of_the_largest_batches() -> None:
    figure = picture.cost_figure(report())
    left, right = figure.axes
    texts = [t.get_text() for t in left.texts]
    assert texts[0] == "3 %" and texts[-2] == "33 %"  # of 2 and 4 %, of 22 and 44 %
    assert "50 % with refreshes" in texts[list(picture.LABELS).index("self_guided_cached")]
    assert [t.get_text() for t in left.get_yticklabels()] == list(picture.LABELS.values())
    assert {t.get_text() for t in right.texts} == {"random, N^2.0", "self-guided solver, N^2.0"}
    assert picture.cost_figure({**report(), "scaling": []}).axes[0].get_xscale() == "log"
