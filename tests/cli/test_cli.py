# SPDX-License-Identifier: Apache-2.0
"""What the command line answers: help, recipes, mistakes with the nearest name, exit status, JSON reports."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.config import differences, flatten, from_dict, to_dict
from masktrain.errors import ConfigError, MasktrainError
from masktrain.recipes import RECIPES, SIZES, find
from masktrain.training.recipe import Recipe

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_help_lists_the_commands_and_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = runs.masktrain("--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    for command in ("run", "recipes", "data", "doctor"):
        assert command in done.stdout
    # not a speed claim: a torch import alone takes longer than this
    assert min(seconds) < 1.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["rnu"], "run"),
        (["run", "--recipe", "mae_ast_fram"], "mae_ast_frame"),
        (["run", "--recipe", "mae_ast_frame", "--size", "tny"], "tiny"),
        (["run", "--recipe", "mae_ast_frame", "--stesp", "3"], "--steps"),
        (["run", "--recipe", "mae_ast_frame", "--masking.mask-ration", "0.5"], "mask-ratio"),
        (["run", "--recipe", "mae_ast_frame", "--masking.mask-ratio", "1.5"], "0 and 1"),
        (["run", "--recipe", "mae_ast_frame", "--masking.mask-ratio", "much"], "much"),
        (["run", "--recipe", "mae_ast_frame", "--masking", "chunks"], "chunk"),
        (["run", "--recipe", "mae_ast_frame", "--steps", "0"], "at least 1"),
        (["run", "--recipe", "mae_ast_frame", "--minutes", "-1"], "above 0"),
        (["run", "--recipe", "mae_ast_frame", "--minutes", "1", "--steps", "5"], "not both"),
        (["run", "--recipe", "mae_ast_frame", "--batch-size", "-4"], "at least 1"),
        (["run", "--recipe", "mae_ast_frame", "--seed", "-1"], "seed"),
        (["run", "--recipe", "mae_ast_frame", "--device", "tpu"], "cuda"),
        (["run", "--recipe", "mae_ast_frame", "--device", "cpu", "--precision", "fp16"], "fp32"),
        (["run", "--recipe", "mae_ast_frame", "--loader", "torchaudio"], "soundfile"),
        (["run", "--recipe", "mae_ast_frame", "--data", "/nowhere/at/all.csv"], "/nowhere/at/all.csv"),
        (["run"], "--recipe"),
        (["run", "--resume", "/nowhere"], "no such folder"),
        (["run", "--recipe", "mae_ast_frame", "stray"], "'stray' is no option"),
        (["run", "--recipe", "mae_ast_frame", "--data"], "expected one value"),
        (["run", "--recipe", "mae_ast_frame", "--data", ""], "empty path"),
        (["run", "--recipe", "mae_ast_frame", "--steps", "1e3"], "a whole number"),
        (["run", "--recipe", "mae_ast_frame", "--batch-size", "10000000"], "at most"),
        (["run", "--recipe", "mae_ast_frame", "--train.steps", "3"], "'--steps'"),
        (["run", "--recipe", "mae_ast_frame", "--mask_ratio", "0.5"], "'--masking.mask-ratio'"),
        (
            ["run", "--recipe", "mae_ast_frame", "--data.crop-to-batch-min", "maybe"],
            "--data.no-crop-to-batch-min",
        ),
        (["run", "--recipe", "mae_ast_frame", "--optim.betas", "0.9"], "2 values"),
        (["run", "--recipe", "mae_ast_frame", "--optim.betas", "0.9", "0.98", "1"], "2 values"),
        (["run", "--recipe", "mae_ast_frame", "--optim.betas", "0.9", "two"], "a number"),
        (["run", "--recipe", "mae_ast_frame", "--optim.lr", "-1e-3"], "above 0"),
        (["run", "--recipe", "mae_ast_frame", "--model.embed-dim", "1" + "0" * 30], "under 2^53"),
        (["run", "--recipe", "mae_ast_frame", "--model.norm", "rms"], "post, pre"),
        (
            ["run", "--recipe", "mae_ast_frame", "--precision", "fp32", "--train.precision", "bf16"],
            "one of them",
        ),
        (["run", "--recipe", "mae_ast_frame", "--loss", "3"], "no option '--loss'"),
        (["run", "--recipe", "mae_ast_frame", "-x", "3"], "no option '-x'"),
        (["recipes", "list", "mae_ast_frame"], "expected 0 names"),
        (["recipes", "show", "mae_ast_frame:tyni"], "tiny"),
        (["recipes", "diff", "mae_ast_frame"], "expected 2 names"),
        (["recipes", "show", "mae_ast_frame", "--jsn", "x"], "--json"),
        (["doctor", "now"], "'now' is no option"),
        (["data", "stats", "/nowhere", "--frontend", "mae_ats"], "mae_ast"),
        (["data", "stats", "/nowhere", "--seed", "-1"], "2^48"),
        (["data", "index", "/nowhere"], "--out"),
        (["data", "index", "-o", "x.tsv"], "no path"),
        (["data", "demo", "-o", "/proc/demo"], "/proc/demo"),
        (["recipes", "shwo", "mae_ast_frame"], "show"),
        (["recipes", "show", "mae_ast"], "mae_ast_frame"),
        (["data", "indx"], "index"),
        (["data", "stats", "/nowhere"], "/nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message_and_status_2(cli: Cli, arguments: list[str], named: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    message = [line for line in done.stderr.splitlines() if not line.startswith(("note: --", "usage:", " "))]
    assert message[0].startswith("masktrain: ") and named in done.stderr


def test_a_mistake_ends_the_process_with_status_2() -> None:
    done = runs.masktrain("run", "--recipe", "mae_ast_frame", "--size", "tny")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        done.stderr
        == "masktrain: --size: no choice 'tny'. Did you mean 'tiny'? Allowed: tiny, small, base.\n"
    )


def test_the_last_of_an_option_counts_and_is_noted(cli: Cli, tmp_path: Path, good: Path) -> None:
    out = tmp_path / "run"
    more = ["--data", good, "--out", out, "--steps", "3", "--steps=2", "--masking.mask_ratio", ".5"]
    done = cli("run", "--recipe", "mae_ast_frame", *runs.SMALL, *more, "--masking.mask-ratio", "0.6")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "note: --steps was given 2 times; the last one counts.",
        "note: --masking.mask-ratio was given 2 times; the last one counts.",
    ]
    stored = json.loads((out / "config.json").read_text())["recipe"]
    assert stored["train"]["steps"] == 2 and stored["masking"]["mask_ratio"] == 0.6


def test_fields_of_another_masking_strategy_can_be_set(cli: Cli, tmp_path: Path, good: Path) -> None:
    out = tmp_path / "run"
    more = ["--data", good, "--out", out, "--steps", "1", "--masking", "chunk", "--masking.growth", "wrap"]
    done = cli(
        "run",
        "--recipe",
        "mae_ast_frame",
        *runs.SMALL,
        *more,
        "--optim.lr",
        "1e-3",
        "--data.clip-seconds",
        "none",
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads((out / "config.json").read_text())["recipe"]
    assert (stored["masking"]["type"], stored["masking"]["growth"]) == ("ChunkMasking", "wrap")
    assert stored["masking"]["mask_ratio"] == 0.75 and stored["data"]["clip_seconds"] is None


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", SIZES)
def test_recipes_build_and_round_trip(name: str, size: str) -> None:
    recipe = find(name, size)
    assert recipe.name == name and recipe.size == size
    stored = json.loads(json.dumps(to_dict(recipe)))
    assert from_dict(Recipe, stored) == recipe
    assert differences(recipe, from_dict(Recipe, stored)) == []
    assert recipe.grid.freq * recipe.grid.patch_freq == recipe.frontend.n_mels


SET_BY_SIZE = ("size", "batch_size", "optim.lr", "optim.blr", "optim.blr_clips")
# SSAST's sizes are published, each with its own number of steps
PUBLISHED_WITH_SIZE = ("schedule.evaluate_every", "schedule.total_steps")


@pytest.mark.parametrize("name", RECIPES)
def test_sizes_change_model_batch_and_rate_only(name: str) -> None:
    for size in SIZES[:-1]:
        changed = {field for field, _, _ in differences(find(name, "base"), find(name, size))}
        assert changed
        allowed = SET_BY_SIZE + (PUBLISHED_WITH_SIZE if name.startswith("ssast") else ())
        assert all(f.startswith("model.") or f in allowed for f in changed), changed


def test_show_and_diff_report_every_value(cli: Cli, tmp_path: Path) -> None:
    done = cli("recipes", "show", "mae_ast_patch:tiny", "--json", tmp_path / "show.json")
    assert done.returncode == 0, done.stderr
    shown = json.loads((tmp_path / "show.json").read_text())
    assert shown == json.loads(json.dumps(to_dict(find("mae_ast_patch", "tiny"))))
    for field in flatten(find("mae_ast_patch", "tiny")):
        if field not in ("type", "readings", "sources"):
            assert field in done.stdout
    done = runs.masktrain(
        "recipes", "diff", "mae_ast_frame", "mae_ast_patch", "--json", tmp_path / "diff.json"
    )
    assert done.returncode == 0, done.stderr
    fields = {row["field"] for row in json.loads((tmp_path / "diff.json").read_text())}
    assert {"tokens.patch_time", "masking.type"} <= fields


def test_published_values_of_mae_ast() -> None:
    """facts of the paper and of AlanBaade/MAE-AST-Public that a changed default must not lose."""
    frame, patch = find("mae_ast_frame"), find("mae_ast_patch")
    assert (frame.frontend.sample_rate, frame.frontend.n_mels) == (16000, 128)
    assert (frame.tokens.patch_freq, frame.tokens.patch_time) == (128, 2)
    assert (patch.tokens.patch_freq, patch.tokens.patch_time) == (16, 16)
    for recipe in (frame, patch):
        assert recipe.tokens.order == "time" and recipe.tokens.partial == "drop"
        assert recipe.masking.mask_ratio == 0.75
        assert recipe.input_norm.factor == 0.5
        model = recipe.model
        assert (model.encoder_layers, model.decoder_layers, model.embed_dim, model.ffn_dim) == (
            12,
            2,
            768,
            3072,
        )
        assert (model.heads, model.norm) == (12, "post")
        assert (model.dropout, model.attention_dropout, model.activation_dropout) == (0.1, 0.1, 0.0)
        assert (model.dropout_input, model.encoder_layerdrop, model.decoder_layerdrop) == (0.1, 0.05, 0.0)
        assert (recipe.objective.reconstruction_weight, recipe.objective.info_nce_weight) == (10.0, 1.0)
        optim = recipe.optim
        assert (optim.lr, optim.betas, optim.eps, optim.weight_decay) == (1e-4, (0.9, 0.98), 1e-6, 0.01)
        assert optim.clip_norm == 10.0 and optim.decay_all
        assert (recipe.schedule.warmup_steps, recipe.schedule.total_steps) == (32_000, 550_000)
    assert find("mae_ast_frame_6l").model.encoder_layers == 6
    assert find("mae_ast_patch_6l").model.encoder_layers == 6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_damage_to_a_stored_recipe_is_a_config_error(data: st.DataObject) -> None:
    """Replace, drop or add one value anywhere in a stored recipe: a ConfigError, or a recipe that is that value."""
    stored = to_dict(find("mae_ast_frame", "tiny"))
    node = stored
    while True:
        name = data.draw(st.sampled_from(sorted(node)))
        if isinstance(node[name], dict) and data.draw(st.booleans()):
            node = node[name]
            continue
        break
    action = data.draw(st.sampled_from(["replace", "drop", "add"]))
    if action == "replace":
        node[name] = data.draw(JSON)
    elif action == "drop":
        del node[name]
    else:
        node[data.draw(st.text(min_size=1, max_size=8))] = data.draw(JSON)
    try:
        rebuilt = from_dict(Recipe, json.loads(json.dumps(stored)))
    except MasktrainError as error:
        assert isinstance(error, ConfigError)
        assert str(error)
    else:
        assert isinstance(rebuilt, Recipe)


def test_doctor_names_what_serves(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor", "--json", tmp_path / "doctor.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "doctor.json").read_text())
    ops = {row["op"] for row in report["ops"]}
    assert {"philox_words", "dropout", "varlen_attention"} <= ops
    assert {row["package"] for row in report["packages"]} >= {"triton", "nvidia-dali-cuda130", "flash-attn"}
    assert report["loader"]
