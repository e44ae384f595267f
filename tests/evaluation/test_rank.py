# SPDX-License-Identifier: Apache-2.0
"""Effective rank against its definition and matrices of known rank; representations under masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from masktrain.errors import ConfigError
from masktrain.evaluation.encoder import FrozenEncoder
from masktrain.evaluation.rank import MaskedFeatures, RankConfig, effective_rank, rank_figure, singular_values
from masktrain.masking.plan import visible_count
from masktrain.models import registry
from masktrain.recipes import find
from masktrain.types import AudioBatch

MASKS = ("none", "random", "time_frequency")


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_orthogonal_directions_of_one_size_are_their_number(rank: int) -> None:
    rng = np.random.default_rng(rank)
    left = np.linalg.qr(rng.standard_normal((40, rank)))[0]
    right = np.linalg.qr(rng.standard_normal((24, rank)))[0]
    z = torch.from_numpy(7.5 * left @ right.T)
    assert effective_rank(singular_values(z)) == pytest.approx(rank, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_effective_rank_is_that_of_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((50, 20)) @ np.diag(rng.uniform(0, 1, 20) ** 4) + seed
    p = np.linalg.svd(z, compute_uv=False)
    p /= p.sum()
    expected = float(np.exp(-sum(x * np.log(x) for x in p)))
    found = effective_rank(singular_values(torch.from_numpy(z)))
    assert found == pytest.approx(expected, rel=1e-9)
    assert 1 <= found <= 20
    assert effective_rank(singular_values(torch.from_numpy(z * 1e-9))) == pytest.approx(expected, rel=1e-6)


def test_collapse_is_rank_one_and_zeros_have_none() -> None:
    assert effective_rank(singular_values(torch.ones(30, 8))) == pytest.approx(1.0, abs=1e-9)
    assert effective_rank(singular_values(torch.zeros(30, 8))) == 0.0
    two = torch.tensor([3.0, 1.0, 0.0])
    assert effective_rank(two) == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


def encoder_of(name: str) -> FrozenEncoder:
    recipe = find(name, "tiny")
    model_config = replace(
        recipe.model,
        **{f: v for f, v in {"encoder_layers": 2, "layers": 2}.items() if hasattr(recipe.model, f)},
    )
    recipe = replace(recipe, model=model_config)
    torch.manual_seed(0)
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    return FrozenEncoder(recipe, model.eval(), name)


def audio_of(seconds: tuple[float, ...], rate: int = 16000) -> AudioBatch:
    lengths = tuple(int(s * rate) for s in seconds)
    generator = torch.Generator().manual_seed(5)
    return AudioBatch(
        samples=0.1 * torch.randn(sum(lengths), generator=generator),
        lengths=lengths,
        sample_rates=(rate,) * len(lengths),
        clip_ids=torch.arange(len(lengths)) + 3,
        starts=torch.zeros(len(lengths), dtype=torch.int64),
    )


def one(audio: AudioBatch, clip: int) -> AudioBatch:
    start = sum(audio.lengths[:clip])
    return replace(
        audio,
        samples=audio.samples[start : start + audio.lengths[clip]],
        lengths=audio.lengths[clip : clip + 1],
        sample_rates=audio.sample_rates[:1],
        clip_ids=audio.clip_ids[clip : clip + 1],
        starts=audio.starts[:1],
    )


@pytest.mark.parametrize("recipe", ["mae_ast_patch", "ssast_patch"])
def test_a_clip_is_the_mean_of_its_visible_tokens(recipe: str) -> None:
    encoder = encoder_of(recipe)
    audio = audio_of((1.3, 0.7, 2.0))
    for mask in MASKS:
        masking = RankConfig().masks()[mask]
        source = MaskedFeatures(encoder, masking, seed=1)
        layers = list(range(1, encoder.n_layers + 1))
        found = source.pooled(audio, layers)
        assert found.shape == (len(layers), 3, encoder.width)
        # the plan that it drew, and with it what the encoder says
        plan = source._plan
        assert plan is not None
        assert source.visible_share == len(plan.visible) / sum(plan.layout.lengths)
        if mask == "none":
            assert source.visible_share == 1
        for layer, encoded in encoder.embed(audio, layers, lambda layout, plan=plan: plan).items():
            tokens, visible = encoded.tokens, set(plan.visible.tolist())
            ids = plan.visible.tolist() if len(tokens) == len(visible) else range(len(tokens))
            for clip in range(3):
                a, b = plan.layout.cu_tokens[clip], plan.layout.cu_tokens[clip + 1]
                rows = [row for row, token in enumerate(ids) if a <= token < b and token in visible]
                expected = torch.stack([tokens[row].double() for row in rows]).mean(0)
                torch.testing.assert_close(found[layer - 1, clip].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", MASKS)
def test_a_clip_does_not_depend_on_its_batch(mask: str) -> None:
    encoder, audio = encoder_of("mae_ast_patch"), audio_of((1.3, 0.7, 2.0))
    source = MaskedFeatures(encoder, RankConfig().masks()[mask], seed=1)
    together = source.pooled(audio, [1, 2])
    for clip in range(3):
        torch.testing.assert_close(
            together[:, clip], source.pooled(one(audio, clip), [1, 2])[:, 0], atol=1e-5, rtol=1e-5
        )


def test_masks_hide_what_their_ratios_say() -> None:
    encoder, audio = encoder_of("mae_ast_patch"), audio_of((4.0, 4.0))
    columns = encoder.layout(audio).columns[0]
    sources = {m: MaskedFeatures(encoder, masking, 0) for m, masking in RankConfig().masks().items()}
    features = {mask: source.pooled(audio, [2]) for mask, source in sources.items()}
    tokens = 8 * columns
    kept = visible_count(columns, 0.6) * visible_count(8, 0.4)
    assert sources["time_frequency"].visible_share == kept / tokens
    assert sources["random"].visible_share == visible_count(tokens, 1 - 0.4 * 0.6) / tokens
    assert RankConfig(mask_ratio=0.5).masks()["random"].mask_ratio == 0.5  # type: ignore[union-attr]
    assert not torch.allclose(features["none"], features["random"])
    other = MaskedFeatures(encoder, RankConfig().masks()["random"], seed=1).pooled(audio, [2])
    assert not torch.equal(other, features["random"])


def test_wrong_numbers_are_refused() -> None:
    for wrong in ({"clips": 1}, {"mask_ratio": 1.0}, {"mask_t_prob": -0.1}, {"mask_f_prob": 1.5}):
        with pytest.raises(ConfigError):
            RankConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("every_layer", [False, True])
def test_the_picture_shows_every_encoder_and_mask(every_layer: bool) -> None:
    rng = np.random.default_rng(0)
    encoders = [
        {
            "name": name,
            "ranks": [
                {
                    "mask": mask,
                    "visible_share": 0.5,
                    "layer": layer,
                    "effective_rank": 3.0 + layer,
                    "singular_values": sorted(rng.random(8), reverse=True) if name != "zero" else [0.0] * 8,
                }
                for mask in MASKS
                for layer in ((1, 2) if every_layer else (2,))
            ],
        }
        for name in ("trained", "zero")
    ]
    report = {"clips": 20, "config": {"every_layer": every_layer}, "encoders": encoders}
    figure = rank_figure(report)
    spectrum, ranks = figure.axes
    assert len([line for line in spectrum.lines if len(line.get_xdata())]) == 6
    assert [text.get_text() for text in spectrum.get_legend().get_texts()] == ["trained", "zero"]
    drawn = [line for line in ranks.lines if every_layer] or list(ranks.patches)
    assert len(drawn) == 6
