# SPDX-License-Identifier: Apache-2.0
"""Every strategy trains every recipe that it fits, and what a strategy looks at changes nothing but the masks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pytest
import torch
from steps import new_step
from torch.utils.flop_counter import FlopCounterMode

from masktrain.errors import ConfigError
from masktrain.masking import STRATEGIES, Strategy, check_plan, plan_from_ids, visible_count
from masktrain.masking.hint import HintConfig
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.masking.strategies import RandomMasking
from masktrain.masking.view import View
from masktrain.recipes import find
from masktrain.training.masking_fit import check, put
from masktrain.training.recipe import Recipe
from masktrain.training.step import Step
from masktrain.training.step_view import clips_of, for_evaluation
from masktrain.training.validation import Validator
from masktrain.types import AudioBatch, MaskPlan, StepKey, TokenLayout

FAMILIES = ("mae_ast_patch", "mae_ast_frame", "ssast_patch", "ssast_frame", "maskspec", "msm_mae", "audiomae")
SMALL = {
    "encoder_layers": 2, "embed_dim": 32, "ffn_dim": 64, "heads": 2,
    "decoder_layers": 1, "decoder_embed_dim": 32, "decoder_ffn_dim": 64, "decoder_heads": 2,
}  # fmt: skip
NOW = HintConfig(start_epoch=0)
"""A hint that begins in the first step."""


def small(name: str, **data: Any) -> Recipe:
    recipe = find(name, "tiny")
    own = {field.name for field in fields(recipe.model)}
    model = replace(recipe.model, **{name: value for name, value in SMALL.items() if name in own})
    # a batch of two clips, of up to a second
    return replace(
        recipe, model=model, batch_size=2, data=replace(recipe.data, **{"clip_seconds": 1.0, **data})
    )


def under(recipe: Recipe, name: str, **values: Any) -> Recipe:
    recipe = put(recipe, STRATEGIES[name])
    if hasattr(recipe.masking, "hint"):
        values = {"hint": NOW, **values}
    return replace(recipe, masking=replace(recipe.masking, **values))


def audio_of(recipe: Recipe, seconds: tuple[float, ...] = (1.0, 0.6)) -> AudioBatch:
    rate = recipe.frontend.sample_rate
    lengths = tuple(int(rate * s) for s in seconds)
    ids = torch.arange(3, 3 + len(lengths))
    samples = 0.1 * torch.randn(sum(lengths), generator=torch.Generator().manual_seed(1))
    return AudioBatch(samples, lengths, (rate,) * len(lengths), ids, torch.zeros_like(ids))


def view_in(step: Step, number: int = 1) -> Any:
    """Return the view of a step's batch."""
    step.model.train()
    key = StepKey.make(step.recipe.seed, number, "cpu")
    spectrogram = step.spectrogram(audio_of(step.recipe), key)
    norm = step.model.input_norm
    mean, scale = norm.affine(norm.statistics(spectrogram.frames) if norm.uses_batch else None)
    return step.view(number, spectrogram, mean, scale)


@pytest.mark.parametrize("masking", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_strategy_trains_every_recipe_that_it_fits(family: str, masking: str) -> None:
    recipe = under(small(family), masking)
    try:
        check(recipe, 1)
    except ConfigError as error:
        assert recipe.grid.freq == 1 and masking in ("frequency", "inverse_block")
        assert "one row" in str(error) and "frame, random or chunk" in str(error)
        return
    assert recipe.grid.freq > 1 or masking not in ("frequency", "inverse_block")
    step = new_step(recipe)
    view = view_in(step)
    for plan in step.plans(view, StepKey.make(0, 1, "cpu")):
        check_plan(plan)
        if masking not in ("frame", "time", "frequency", "time_frequency"):
            ratio = recipe.masking.mask_ratio
            assert plan.n_visible == tuple(visible_count(n, ratio) for n in plan.layout.lengths)
    weights = copy.deepcopy(step.model.state_dict())
    result = step(1, [audio_of(recipe)])
    assert torch.isfinite(result.loss) and torch.isfinite(result.grad_norm) and result.grad_norm > 0
    changed = [
        name for name, value in step.model.state_dict().items() if not torch.equal(value, weights[name])
    ]
    assert any(name.startswith("encoder.blocks") for name in changed)


@dataclass(frozen=True, kw_only=True)
class GivenMasking:
    """The masks of another run."""

    name: ClassVar[str] = "given"
    needs: ClassVar[str] = "nothing"

    plans: tuple[MaskPlan, ...] = ()

    def plan(self, layout: TokenLayout, key: StepKey, draw: int = 0, view: View | None = None) -> MaskPlan:
        seen, start = [], 0
        ids = self.plans[draw].visible.tolist()
        for n in layout.lengths:
            seen.append([t - start for t in ids if start <= t < start + n])
            start += n
        return plan_from_ids(layout, seen)


@pytest.mark.parametrize("family", ["mae_ast_patch", "ssast_patch", "audiomae"])
def test_a_feature_pass_changes_nothing_but_the_masks(family: str) -> None:
    """The step under self-guided masks equals, bit for bit, the one that is given these masks: dropout, layerdrop,
    running statistics and gradients included; and torch's own generator does not move."""
    recipe = under(small(family), "self_guided")
    step = new_step(recipe)
    plans = step.plans(view_in(step), StepKey.make(0, 1, "cpu"))
    before = torch.get_rng_state()
    found = step(1, [audio_of(recipe)])
    assert torch.equal(torch.get_rng_state(), before)
    given: Any = GivenMasking(plans=plans)
    other = new_step(replace(recipe, masking=given))
    same = other(1, [audio_of(recipe)])
    assert torch.equal(found.loss, same.loss) and torch.equal(found.grad_norm, same.grad_norm)
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert found.flops > same.flops


def test_features_are_those_of_evaluation_mode() -> None:
    """With dropout of a half in the recipe, in training mode: those of the model without."""
    recipe = small("mae_ast_patch")
    dropping = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "encoder_layerdrop": 0.5}
    recipe = replace(recipe, model=replace(recipe.model, **dropping))
    step = new_step(under(recipe, "self_guided"))
    view = view_in(step)
    dry = new_step(
        under(replace(recipe, model=replace(recipe.model, **dict.fromkeys(dropping, 0.0))), "self_guided")
    )
    dry.model.load_state_dict(step.model.state_dict())
    for layer in (1, 2, None):
        features = view.features(layer)
        assert not features.requires_grad and features.shape == (sum(view.layout.lengths), 32)
        assert torch.equal(features, view_in(dry).features(layer))
    assert step.model.training


@pytest.mark.parametrize("family", ["mae_ast_patch", "ssast_patch", "msm_mae"])
@pytest.mark.parametrize("layer", [1, None])
def test_the_operations_of_a_feature_pass_are_counted(
    monkeypatch: pytest.MonkeyPatch, family: str, layer: int | None
) -> None:
    """Exactly what torch counts, attention by its explicit definition."""
    monkeypatch.setenv("MASKTRAIN_KERNELS", "reference")
    view = view_in(new_step(under(small(family), "self_guided")))
    with FlopCounterMode(display=False) as counter:
        view.features(layer)
        view.features(layer)
    assert view.done.flops == counter.get_total_flops()


def test_all_masks_of_a_step_share_one_pass_and_one_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """SSAST draws two masks a clip."""
    step = new_step(under(small("ssast_patch"), "self_guided", hint=HintConfig(abs_hint_ratio=0.5)))
    passes, cuts = [], []
    encoded, scores = step.model.encoded, SelfGuidedMasking.scores
    monkeypatch.setattr(step.model, "encoded", lambda *a: passes.append(1) or encoded(*a))
    monkeypatch.setattr(SelfGuidedMasking, "scores", lambda *a: cuts.append(1) or scores(*a))
    first, second = step.plans(view_in(step), StepKey.make(0, 1, "cpu"))
    assert len(passes) == len(cuts) == 1
    assert not torch.equal(first.masked, second.masked)


def test_random_masks_at_the_start_cost_no_features_and_equal_the_random_strategy() -> None:
    """Of 300 epochs 50 are random by default: 2 of 12 steps."""
    recipe = small("mae_ast_patch")
    guided = new_step(put(recipe, SelfGuidedMasking), 12)
    random = new_step(put(recipe, RandomMasking), 12)
    for number in range(3):
        a, b = guided(number, [audio_of(recipe)]), random(number, [audio_of(recipe)])
        assert (a.flops == b.flops) == torch.equal(a.loss, b.loss) == (number < 2)


def test_progress_is_the_share_of_the_schedule_that_lies_behind() -> None:
    recipe = under(small("mae_ast_patch"), "self_guided")
    step = new_step(recipe, 4)
    assert [view_in(step, number).progress for number in range(4)] == [0.0, 0.25, 0.5, 0.75]
    absolute = replace(recipe, schedule=replace(recipe.schedule, scaling="absolute"))
    assert view_in(new_step(absolute, 4), 2).progress == 2 / recipe.schedule.total_steps


def test_features_of_some_clips_are_those_that_the_batch_has() -> None:
    """What a cache computes anew, it computes from the frames of these clips alone."""
    step = new_step(under(small("msm_mae"), "self_guided"))
    view = view_in(step)
    for places in ((1,), (0,), (0, 1)):
        part = clips_of(view.spectrogram, places)
        for i, place in enumerate(places):
            assert torch.equal(part.clip(i), view.spectrogram.clip(place))
        layout, scores = view._fresh(places)
        own = step.view(1, part, view.mean, view.scale)
        assert layout.lengths == own.layout.lengths
        torch.testing.assert_close(scores, own.stored_scores(), atol=0, rtol=0)


# --- held-out clips ---


def test_held_out_masks_stay_the_same_while_the_model_learns() -> None:
    recipe = under(small("mae_ast_patch"), "self_guided")
    step = new_step(recipe)
    audio = audio_of(recipe)
    fresh = Validator(step, [audio], ["a", "b"], 0)
    for number in range(3):
        step(number, [audio])
    later = Validator(step, [audio], ["a", "b"], 0)  # as a resumed run makes it
    random = Validator(new_step(put(recipe, RandomMasking)), [audio], ["a", "b"], 0)
    for other in (later, random):
        assert torch.equal(fresh.plans[0][0].masked, other.plans[0][0].masked)


@pytest.mark.parametrize(
    ("masking", "own"),
    [
        (STRATEGIES["dispersion"](mask_ratio=0.7), False),
        (SelfGuidedMasking(mask_ratio=0.7), False),
        (STRATEGIES["chunk"](), True),
        (STRATEGIES["inverse_block"](start_epoch=3), True),
    ],
)
def test_strategies_that_look_at_clips_are_evaluated_at_random(masking: Strategy, own: bool) -> None:
    assert for_evaluation(masking) == (masking if own else RandomMasking(mask_ratio=0.7))


def test_the_mask_rate_map_shows_the_masks_of_training() -> None:
    """Of a strategy that looks at clips: one mask of each that is held out, random at the start."""
    recipe = under(small("mae_ast_patch"), "dispersion")
    step = new_step(recipe)
    validator = Validator(step, [audio_of(recipe)], ["a", "b"], 0)
    (first,), (last,) = (tuple(validator.plans_of_training(done)) for done in (0, 4))
    assert torch.equal(first.masked, validator.plans[0][0].masked)
    assert not torch.equal(first.masked, last.masked) and first.n_masked == last.n_masked


# --- what does not fit ---


def test_a_layer_that_the_encoder_does_not_have_is_refused() -> None:
    recipe = small("mae_ast_patch")
    check(replace(recipe, masking=SelfGuidedMasking(layer=2)), 1)
    with pytest.raises(ConfigError, match="has 2 layers"):
        check(replace(recipe, masking=SelfGuidedMasking(layer=3)), 1)


def test_a_strategy_takes_over_the_share_of_masked_tokens() -> None:
    for family in ("ssast_patch", "audiomae"):
        recipe = find(family, "tiny")
        for name, cls in STRATEGIES.items():
            found = put(recipe, cls).masking
            own = cls() if name in ("time_frequency", "patch_drop") else recipe.masking
            assert type(found) is cls and found.mask_ratio == own.mask_ratio


def test_one_mask_for_the_batch_only_where_its_clips_have_one_length() -> None:
    drop = STRATEGIES["patch_drop"]
    assert not put(small("mae_ast_patch"), drop).masking.shared_in_batch  # type: ignore[union-attr]
    equal = small("mae_ast_patch", crop_to_batch_min=True)
    assert put(equal, drop).masking == drop()
