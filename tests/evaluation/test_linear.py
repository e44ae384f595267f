# SPDX-License-Identifier: Apache-2.0
"""`masktrain evaluate linear` on synthetic sounds of three kinds: scores, intervals, heads, pretraining data, mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from masktrain.cli import _main
from masktrain.config import to_dict
from masktrain.evaluation.intervals import paired, t_interval
from masktrain.evaluation.labels import read_labelled
from masktrain.evaluation.linear import Against, LinearConfig, evaluate_linear, heard
from masktrain.evaluation.probe import ProbeConfig
from masktrain.models import registry
from masktrain.recipes import find
from masktrain.training import checkpoint
from masktrain.training.run_spec import RunSpec, spec_to_json

KINDS = ("low", "high", "noise")
CLIPS = 60
SHORT = ProbeConfig(epochs=25)


def sound(kind: str, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(int(16000 * rng.uniform(0.5, 0.9))) / 16000
    if kind == "noise":
        return 0.1 * rng.standard_normal(len(t))
    hz = rng.uniform(150, 300) if kind == "low" else rng.uniform(2500, 4000)
    return 0.3 * np.sin(2 * np.pi * hz * t) + 0.003 * rng.standard_normal(len(t))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of 60 clips of three kinds in five folds, with one and with several labels."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lines = ["path,kind,tags,fold"]
    for number in range(CLIPS):
        kind = KINDS[number % 3]
        soundfile.write(folder / f"{number}.wav", sound(kind, rng), 16000, subtype="PCM_16")
        tags = kind if kind == "noise" else f"{kind};tone"
        lines.append(f"{number}.wav,{kind},{tags},{number // 3 % 5 + 1}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder / "clips.csv"


def make_run(folder: Path, data: tuple[Path, ...], seed: int = 0) -> Path:
    """Write a run folder with fresh weights."""
    recipe = find("mae_ast_patch", "tiny")
    sizes = {"embed_dim": 32, "ffn_dim": 64, "heads": 2}
    model = replace(recipe.model, encoder_layers=2, decoder_layers=1, **sizes)
    recipe = replace(recipe, model=model)
    torch.manual_seed(seed)
    state = registry.build(recipe.model, recipe.grid, recipe.input_norm).state_dict()
    folder.mkdir()
    spec = RunSpec(recipe, data, folder, "cpu", None, None, False, ())
    (folder / "config.json").write_text(json.dumps(spec_to_json(spec, "none")))
    checkpoint.save(
        folder / "checkpoints",
        1,
        {"model": {name: tensor.contiguous() for name, tensor in state.items()}},
        {"recipe_config": to_dict(recipe)},
        keep_last=1,
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run whose config names the corpus as its data."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", (corpus,))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features, computed once for all tests."""
    return tmp_path_factory.mktemp("cache")


def evaluate(*arguments: str | Path) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = _main(["evaluate", "linear", *map(str, arguments)])
    return status, out.getvalue(), err.getvalue()


def test_report_pictures_and_differences(tmp_path: Path, run: Path, corpus: Path, cache: Path) -> None:
    path = tmp_path / "report.json"
    given = "--label kind --seeds 3 --lr 3e-2 --epochs 25 --against logmel --against untrained --device cpu".split()
    status, out, err = evaluate(
        "--checkpoint",
        run,
        "--data",
        corpus,
        *given,
        "--out",
        tmp_path / "out",
        "--json",
        path,
        "--cache",
        cache,
    )
    assert status == 0, err
    report = json.loads(path.read_text())
    assert report == json.loads((tmp_path / "out" / "linear.json").read_text())
    assert (report["metric"], report["classes"]) == ("accuracy", sorted(KINDS))
    assert [(s["train"], s["valid"], s["test"]) for s in report["splits"]] == [(48, None, 12)] * 5
    assert report["splits"][0]["clips_of_class"]["test"] == [4, 4, 4]
    (row,) = report["encoders"]
    scores = np.array(row["scores"])
    assert scores.shape == (3, 5) and row["mean"] == pytest.approx(scores.mean())
    assert row["mean"] > 0.8, "tones and noise are told apart by any features"
    assert row["over_seeds"]["std"] == pytest.approx(scores.mean(1).std(ddof=1))
    # the confusion matrix and the table are of the same answers as the score
    counts = np.array(row["confusion"])
    assert counts.sum(1).tolist() == pytest.approx([20, 20, 20])
    assert np.trace(counts) / CLIPS == pytest.approx(scores.mean())
    assert [one["recall"] for one in row["classes"]] == pytest.approx((np.diag(counts) / 20).tolist())
    for kind in ("logmel", "untrained"):
        other = row["against"][kind]
        gap = other["difference"]
        assert gap["pairs"]["n"] == 15 and gap["splits"]["n"] == 5
        assert gap["pairs"]["mean"] == pytest.approx((scores - np.array(other["scores"])).mean())
        assert f"above {kind}" in out
    for name in ("class_balance", "confusion", "classes"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "transductive" in err + out and row["pretraining"]["state"] == "transductive"


def test_pictures_of_layers_and_of_several_labels(
    tmp_path: Path, run: Path, corpus: Path, cache: Path
) -> None:
    """One seed: no spread and no interval over seeds anywhere; several labels: no confusion matrix."""
    given = "--label tags --seeds 1 --epochs 3 --head layers --against logmel --device cpu".split()
    status, out, err = evaluate(
        "--checkpoint", run, "--data", corpus, *given, "--out", tmp_path / "out", "--cache", cache
    )
    assert status == 0, err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "class_balance.png",
        "classes.png",
        "layers.png",
        "linear.json",
    }
    report = json.loads((tmp_path / "out" / "linear.json").read_text())
    assert report["encoders"][0]["over_seeds"]["std"] is None
    assert "spread" not in out and "layer 2" in out
    assert "not done after 3 epochs" in out, "classifiers that were cut short are said to be"


def report_of(
    run: Path,
    corpus: Path,
    cache: Path,
    config: LinearConfig,
    label: str = "kind",
    against: Sequence[Against] = (),
) -> dict[str, Any]:
    labelled = read_labelled(corpus, label=label)
    device = torch.device("cpu")
    return evaluate_linear([run], labelled, config, against=against, device=device, cache=cache)


def test_heads_agree_where_they_must(run: Path, corpus: Path, cache: Path) -> None:
    base = LinearConfig(seeds=2, lrs=(3e-2,), probe=SHORT)
    last = report_of(run, corpus, cache, base)["encoders"][0]
    first = report_of(run, corpus, cache, replace(base, layer=1))["encoders"][0]
    every = report_of(run, corpus, cache, replace(base, head="layers"))["encoders"][0]
    assert [one["layer"] for one in every["layers"]] == [1, 2]
    assert every["layers"][0]["scores"] == first["scores"]
    assert every["layers"][1]["scores"] == last["scores"] == every["scores"]
    chosen = np.array(every["layer_chosen_on_validation"]["scores"])
    either = np.stack([first["scores"], last["scores"]])
    assert ((chosen == either).any(0)).all()
    weighted = report_of(run, corpus, cache, replace(base, head="weighted"))["encoders"][0]
    assert sum(weighted["layer_weights"]) == pytest.approx(1) and weighted["mean"] > 0.8
    attentive = report_of(run, corpus, cache, replace(base, head="attentive"))["encoders"][0]
    assert attentive["mean"] > 0.8


def test_learning_rate_is_chosen_on_validation(run: Path, corpus: Path, cache: Path) -> None:
    config = LinearConfig(seeds=2, lrs=(1e-9, 3e-2), probe=SHORT)
    row = report_of(run, corpus, cache, config)["encoders"][0]
    alone = report_of(run, corpus, cache, replace(config, lrs=(3e-2,)))["encoders"][0]
    assert set(np.array(row["lr"]).ravel()) == {3e-2} and row["scores"] == alone["scores"]


def test_several_labels_give_mean_average_precision(run: Path, corpus: Path, cache: Path) -> None:
    config = LinearConfig(seeds=2, lrs=(3e-2,), probe=SHORT)
    report = report_of(run, corpus, cache, config, label="tags")
    assert report["metric"] == "mAP" and report["classes"] == ["high", "low", "noise", "tone"]
    (row,) = report["encoders"]
    assert row["confusion"] is None and row["mean"] > 0.8
    listed = [one["average_precision"] for one in row["classes"]]
    assert np.mean(listed) == pytest.approx(row["mean"])


def test_checkpoints_of_one_recipe_are_also_reported_together(
    tmp_path: Path, run: Path, corpus: Path, cache: Path
) -> None:
    other = make_run(tmp_path / "other", (corpus,), seed=1)
    labelled = read_labelled(corpus, label="kind")
    config = LinearConfig(seeds=2, probe=ProbeConfig(epochs=3))
    report = evaluate_linear(
        [run, other], labelled, config, against=["logmel"], device=torch.device("cpu"), cache=cache
    )
    one, two = report["encoders"]
    assert one["fingerprint"] != two["fingerprint"] and one["scores"] != two["scores"]
    together = report["together"]
    assert together["scores"] == one["scores"] + two["scores"]
    assert together["over_checkpoints"]["n"] == 2
    # a checkpoint counts once, whatever number of classifiers was trained on it
    gap = together["against"]["logmel"]
    assert gap["pairs"]["n"] == 10 and gap["splits"]["n"] == 5
    means = np.stack([np.mean(row["scores"], axis=0) for row in (one, two)])
    logmel = np.array(one["against"]["logmel"]["scores"])
    expected = paired(means, logmel)
    assert (gap["pairs"]["low"], gap["pairs"]["high"]) == pytest.approx(
        (expected.pairs.low, expected.pairs.high)
    )
    assert one["unfinished"] == 1.0


def test_classifiers_on_one_untrained_encoder_are_no_independent_draws(
    run: Path, corpus: Path, cache: Path
) -> None:
    config = LinearConfig(seeds=5, probe=ProbeConfig(epochs=2))
    (row,) = report_of(run, corpus, cache, config, label="kind", against=["untrained"])["encoders"]
    ours, theirs = np.array(row["scores"]), np.array(row["against"]["untrained"]["scores"])
    # seeds 0 and 3 share a draw, as do 1 and 4
    gaps = [(ours - theirs)[draw::3].mean(0) for draw in range(3)]
    expected = t_interval(np.concatenate(gaps))
    assert row["against"]["untrained"]["difference"]["pairs"] == pytest.approx(asdict(expected))


def test_pretraining_on_test_clips_is_found_by_path_and_by_content(
    tmp_path: Path, run: Path, corpus: Path
) -> None:
    labelled = read_labelled(corpus, label="kind")
    found = heard(run, labelled)
    assert (found.state, set(found.clips.values())) == ("transductive", {12})
    assert heard(run / "checkpoints" / "step_00000001", labelled) == found
    # three of the clips under other names, beside others
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in (0, 1, 3):
        shutil.copy(corpus.parent / f"{number}.wav", copies / f"renamed_{number}.wav")
    soundfile.write(copies / "other.wav", sound("noise", np.random.default_rng(9)), 16000)
    found = heard(make_run(tmp_path / "by_content", (copies,)), labelled)
    assert found.state == "transductive"
    assert found.clips == {"fold 1": 2, "fold 2": 1, "fold 3": 0, "fold 4": 0, "fold 5": 0}
    for number in (0, 1, 3):
        (copies / f"renamed_{number}.wav").unlink()
    assert heard(tmp_path / "by_content", labelled).state == "inductive"
    shutil.rmtree(copies)
    assert heard(tmp_path / "by_content", labelled).state == "unknown"
    shutil.move(run / "config.json", tmp_path)
    try:
        assert heard(run, labelled).state == "unknown"
    finally:
        shutil.move(tmp_path / "config.json", run)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--layer 9", "layers 1 to 2"),
        ("--head layers --layer 1", "leave --layer out"),
        ("--head last_layer", "Allowed: last, layers, weighted, attentive"),
        ("--seeds 0", "at least 1; received 0"),
        ("--lr 0", "received 0.0"),
        ("--lr nan", "received nan"),
        ("--epochs 0", "received 0"),
        ("--encode-batch 0", "received 0"),
        ("--label colour", "colour"),
        ("--data absent.csv", "absent.csv"),
        ("--against nothing", "Allowed: untrained, logmel"),
        ("--checkpoint absent", "absent"),
        ("--out FILE", "cannot be made or written"),
    ],
)
def test_mistakes_are_one_message(
    arguments: str, named: str, tmp_path: Path, run: Path, corpus: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    words = [str(file) if word == "FILE" else word for word in arguments.split()]
    base = [] if "--label" in words else ["--label", "kind"]
    base += [] if "--data" in words else ["--data", str(corpus)]
    status, _, err = evaluate(
        "--checkpoint", run, *base, *words, "--cache", tmp_path / "cache", "--device", "cpu"
    )
    assert status == 2 and named in err and err.startswith("masktrain: "), err
    assert "Traceback" not in err


def test_actions() -> None:
    for arguments, named in ((["lineer"], "Did you mean 'linear'"), (["linear"], "--checkpoint is missing")):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert _main(["evaluate", *arguments]) == 2
        assert named in err.getvalue()
