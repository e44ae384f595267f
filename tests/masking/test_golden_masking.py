# SPDX-License-Identifier: Apache-2.0
"""Masks, weights and schedules against what the authors' code recorded: exactly where nothing is random, else by z-tests.

Seeds are fixed: the draws are the same on every machine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masks import batch, check_like, key, mean_z, pairs, rate_z, shown, statistics
from torch import Tensor

from masktrain.masking import (
    DispersionMasking,
    FrequencyMasking,
    HintConfig,
    InverseBlockMasking,
    RandomMasking,
    TimeMasking,
    check_plan,
    visible_count,
)
from masktrain.masking.view import View
from masktrain.types import TokenLayout

Case = tuple[dict[str, Any], dict[str, np.ndarray]]
DRAWS = 4000


@pytest.fixture(scope="module")
def cases(golden_dir: Path) -> Callable[[str], list[Case]]:
    """All recorded cases of a kind, such as `A_dwm` of "dwm"."""

    def find(kind: str) -> list[Case]:
        files = sorted((golden_dir / "masking").glob(f"*_{kind}.json"))
        if not files:
            pytest.skip(f"no golden case *_{kind} in {golden_dir / 'masking'}")
        return [(json.loads(f.read_text()), dict(np.load(f.with_suffix(".npz")))) for f in files]

    return find


def test_hint_schedules(cases: Callable[[str], list[Case]]) -> None:
    for _, arrays in cases("hint_schedule"):
        for name, stored in arrays.items():
            epochs, start, gamma = map(int, re.fullmatch(r"E(\d+)_s(\d+)_k(\d+)", name).groups())
            hint = HintConfig(gamma=gamma, start_epoch=start, epochs=epochs)
            # At the first step of an epoch, and at its last one of 1000.
            for inside in (0, 0.999):
                ours = [hint.ratio((epoch + inside) / epochs) for epoch in range(epochs)]
                assert np.abs(np.array(ours) - stored).max() < 1e-12, (name, inside)


@dataclass(frozen=True, kw_only=True)
class Stored(DispersionMasking):
    """The strategy on weights that were computed before."""

    def scores(self, layout: TokenLayout, view: View) -> Tensor:
        return view.mean


def clips_of(arrays: dict[str, np.ndarray], name: str) -> tuple[TokenLayout, View, tuple[int, int]]:
    """The recorded clips on a grid whose tokens are numbered as the recorded ones are: rows of frequency."""
    lms = torch.from_numpy(arrays[f"{name}/lms_x64"]).float() / 64
    clips, bins, length = lms.shape
    layout, view = batch(
        [length // 16] * clips, bins // 16, "freq", patch=16, frames=lms.mT.reshape(-1, bins), progress=0
    )
    return layout, view, (bins // 16, length // 16)


def test_weights_and_deterministic_masks(cases: Callable[[str], list[Case]]) -> None:
    ties = 0
    for record, arrays in cases("dwm"):
        for name in (n for n, s in record["settings"].items() if "grid" in s):
            layout, view, _ = clips_of(arrays, name)
            for weight, stored in (("mad", "weight_mad"), ("variance", "weight_var")):
                theirs = torch.from_numpy(arrays[f"{name}/{stored}"])
                hint = HintConfig(abs_hint_ratio=0.0)
                ours = DispersionMasking(weight=weight).scores(layout, view).view_as(theirs)
                # The values are multiples of 1/64: the steps of 1/1024 of patch_mad lose nothing.
                assert (ours - theirs).abs().max() < 2e-6 * theirs.max(), (name, weight)
                for ratio in record["settings"][name]["ratios"]:
                    masking = DispersionMasking(
                        mask_ratio=ratio, weight=weight, deterministic=True, hint=hint
                    )
                    plan = masking.plan(layout, key(), view=view)
                    check_plan(plan)
                    at = f"{name}/determ_{weight}_r{round(ratio * 100)}"
                    for clip, gap in enumerate(arrays[f"{at}_gap"]):
                        hidden = ~shown(plan).view_as(theirs)[clip]
                        if gap > 1e-6:
                            assert torch.equal(hidden, torch.from_numpy(arrays[at][clip])), (at, clip)
                        else:
                            ties += 1
    assert ties < 8


def test_dispersion_rates(cases: Callable[[str], list[Case]]) -> None:
    for _, arrays in cases("dwm"):
        names = [n.removesuffix("/n") for n in arrays if re.fullmatch(r"\w+/r\d+_h\d+/n", n)]
        assert names
        for name in names:
            setting, ratio, hint = re.fullmatch(r"(\w+)/r(\d+)_h(\d+)", name).groups()
            weights = torch.from_numpy(arrays[f"{setting}/weight_mad"])
            _, _, grid = clips_of(arrays, setting)
            masking = Stored(mask_ratio=int(ratio) / 100, hint=HintConfig(abs_hint_ratio=int(hint) / 100))
            # One clip shows that the strategy draws as the code does, the last that padding stays visible.
            for clip in (0, len(weights) - 1):
                many, view = batch([grid[1]] * DRAWS, grid[0], "freq", frames=torch.empty(0, grid[0]))
                view = View(0, view.spectrogram, weights[clip].repeat(DRAWS), view.scale)
                v = shown(masking.plan(many, key(clip), view=view)).view(DRAWS, *grid)
                check_like(v, arrays, name, clip)


def test_exchange_of_a_deterministic_mask(cases: Callable[[str], list[Case]]) -> None:
    """How many of the top weights are still masked after the exchange, as often as in the code."""
    for _, arrays in cases("dwm"):
        for name in (n for n in arrays if n.endswith("determ_overlap_hist")):
            setting, ratio, hint = re.match(r"(\w+)/r(\d+)_h(\d+)/", name).groups()
            weights = torch.from_numpy(arrays[f"{setting}/weight_mad"])[0]
            top = torch.from_numpy(arrays[f"{setting}/determ_mad_r{ratio}"][0])
            masking = Stored(
                mask_ratio=int(ratio) / 100,
                deterministic=True,
                hint=HintConfig(abs_hint_ratio=int(hint) / 100),
            )
            many, view = batch([len(weights)] * DRAWS, 1, "freq", frames=torch.empty(0, 1))
            view = View(0, view.spectrogram, weights.repeat(DRAWS), view.scale)
            v = shown(masking.plan(many, key(), view=view)).view(DRAWS, -1)
            values, times = arrays[name].astype(float)
            mean = (values * times).sum() / times.sum()
            spread = ((values - mean) ** 2 * times).sum() / times.sum()
            overlap = (~v & top).sum(1).double()
            assert abs(float(overlap.mean()) - mean) < 4.5 * (spread / DRAWS) ** 0.5, name
            assert 0.85 < float(overlap.var()) / spread < 1.15, name


def test_dispersion_against_exact_probabilities(cases: Callable[[str], list[Case]]) -> None:
    draws = 40000
    for record, arrays in cases("dwm"):
        weights = torch.from_numpy(arrays["tiny/weights"])
        masked = record["settings"]["tiny"]["masked"]
        many, view = batch([len(weights)] * draws, 1, frames=torch.empty(0, 1))
        view = View(0, view.spectrogram, weights.repeat(draws), view.scale)
        for hint in (0, 25, 50, 75):
            masking = Stored(mask_ratio=0.7, hint=HintConfig(abs_hint_ratio=hint / 100))
            v = shown(masking.plan(many, key(), view=view)).view(draws, -1)
            assert (v.sum(1) == len(weights) - masked).all()
            exact = arrays[f"tiny/h{hint}/exact_mask_rate"]
            z = (1 - v.double().mean(0).numpy() - exact) / np.sqrt(exact * (1 - exact) / draws)
            assert np.abs(z).max() < 4, (hint, z)


def test_inverse_blocks(cases: Callable[[str], list[Case]]) -> None:
    for record, arrays in cases("block"):
        for name, setting in record["settings"].items():
            if setting.get("flexible_mask") or setting.get("expand_adjcent"):
                continue
            rows, columns = setting["grid"]
            ratio = setting["mask_prob"]
            masking: RandomMasking | InverseBlockMasking = RandomMasking(mask_ratio=ratio)
            if "mask_length" in setting:
                masking = InverseBlockMasking(
                    mask_ratio=ratio, side=setting["mask_length"], adjust=setting["mask_prob_adjust"]
                )
            many, _ = batch([columns] * DRAWS, rows, "freq", frames=torch.empty(0, rows))
            plan = masking.plan(many, key())
            assert set(plan.n_visible) == set(arrays[f"{name}/visible_count_hist"][0].tolist())
            check_like(shown(plan).view(DRAWS, rows, columns), arrays, name)


AXES = {"time": TimeMasking, "freq": FrequencyMasking}


def test_stored_noise_of_audiomosaic(cases: Callable[[str], list[Case]]) -> None:
    """The noise of the code gives its masks by our units and our counts, in either order of tokens."""
    for record, arrays in cases("axis"):
        for name in (n for n in record["settings"] if n.startswith("mosaic_")):
            setting = record["settings"][name]
            masking = AXES[name.split("_")[1]](mask_ratio=setting["ratio"], reading="code")
            noise, mask = (torch.from_numpy(arrays[f"{name}/{what}"]) for what in ("noise", "mask"))
            columns, rows = setting["grid"]
            for order in ("time", "freq"):
                layout, _ = batch([columns] * len(noise), rows, order)
                n_units, clip, unit = masking.units(layout)
                assert set(n_units) == {noise.shape[1]}
                kept = visible_count(n_units[0], setting["ratio"])
                hidden = noise.argsort(1).argsort(1) >= kept
                ours = hidden[clip, unit.long()].view(len(noise), -1)
                if order == "freq":
                    ours = ours.view(len(noise), rows, columns).mT.flatten(1)
                assert torch.equal(ours, mask), (name, order)
                assert set(masking.plan(layout, key()).n_visible) == {arrays[f"{name}/ids_keep"].shape[1]}


def test_statistics_of_audiomosaic(cases: Callable[[str], list[Case]]) -> None:
    for record, arrays in cases("axis"):
        for name in (n for n in record["settings"] if n.startswith("mosaic_")):
            setting = record["settings"][name]
            columns, rows = setting["grid"]
            masking = AXES[name.split("_")[1]](mask_ratio=setting["ratio"], reading="code")
            many, _ = batch([columns] * DRAWS, rows, frames=torch.empty(0, rows))
            v = shown(masking.plan(many, key())).view(DRAWS, columns, rows)
            # Tokens of one unit share their rate: its z-values repeat, so that only the largest is judged.
            z = rate_z(v, arrays[f"{name}/visible_rate"], int(arrays[f"{name}/n"]))
            assert np.abs(z).max() < 4.5, name
            for field, values in statistics(v).items():
                assert mean_z(values, arrays[f"{name}/{field}"]) < 4.5, (name, field)
            for values, stored in zip(pairs(v), arrays[f"{name}/pair_visible"], strict=True):
                assert mean_z(values, stored) < 4.5, name
