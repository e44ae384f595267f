# SPDX-License-Identifier: Apache-2.0
"""`masktrain run --masking NAME` and the options of a strategy: what is taken, refused, and said at the start."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import runs

from masktrain.masking import STRATEGIES

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_clips(tmp_path_factory.mktemp("audio"), 24)


def started(cli: Cli, recipe: str, clips: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        "run",
        "--recipe",
        recipe,
        *runs.SMALL,
        "--steps",
        "2",
        "--data",
        str(clips),
        "--out",
        str(out),
    ]
    return cli(*arguments, *options)


def test_the_help_names_every_strategy(cli: Cli) -> None:
    text = " ".join(cli("run", "--help").stdout.replace("│", " ").split())
    told = text.partition("Another masking strategy")[2].partition("The fields of the strategy")[0]
    assert set(STRATEGIES) <= set(told.replace(",", " ").replace(".", " ").replace(":", " ").split())


def test_options_of_the_strategy_reach_the_run_and_its_start_block(
    cli: Cli, clips: Path, tmp_path: Path
) -> None:
    done = started(
        cli, "mae_ast_patch", clips, tmp_path / "run", "--masking", "self_guided", "--masking.rule", "s1_code",
        "--masking.hint.gamma", "4", "--masking.hint.start-epoch", "150", "--masking.layer", "1",
        "--masking.refresh-epochs", "3", "--masking.bipartition", "pca", "--train.pictures", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    masking = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["masking"]
    hint = masking.pop("hint")
    assert masking == {
        "type": "SelfGuidedMasking", "mask_ratio": 0.75, "rule": "s1_code", "bipartition": "pca", "layer": 1,
        "refresh_epochs": 3,
    }  # fmt: skip
    assert hint == {
        "type": "HintConfig",
        "gamma": 4.0,
        "start_epoch": 150,
        "epochs": 300,
        "abs_hint_ratio": None,
    }
    said = " ".join(done.stdout.split())
    for part in (
        "random masks before step 2 (epoch 150 of 300), then 1 - (epoch / 300)^4, 0.938 in the last step",
        "features of encoder layer 1 of 2",
        "rule s1_code, cut by pca",
        "scores kept for up to 3 epochs",
        "random masks of the same ratio",
    ):
        assert part in said, part
    assert (tmp_path / "run" / "pictures" / "mask_rate.png").is_file()


@pytest.mark.parametrize(
    ("recipe", "options", "named"),
    [
        ("mae_ast_patch", ["--masking", "selfguided"], ["'selfguided' is not known", "self_guided"]),
        (
            "mae_ast_frame",
            ["--masking", "inverse_block"],
            ["square blocks", "one row", "--tokens.patch-freq"],
        ),
        ("mae_ast_frame", ["--masking", "frequency"], ["whole rows", "one row"]),
        (
            "mae_ast_patch",
            ["--masking", "self_guided", "--masking.layer", "3"],
            ["masking.layer: 3", "1 to 2"],
        ),
        ("mae_ast_patch", ["--masking", "self_guided", "--masking.rule", "paper2"], ["paper, s1_code"]),
        ("mae_ast_patch", ["--masking", "self_guided", "--masking.hint.gamma", "0"], ["masking.hint.gamma"]),
        ("mae_ast_patch", ["--masking", "random", "--masking.rule", "paper"], ["no option '--masking.rule'"]),
        (
            "mae_ast_patch",
            ["--masking", "self_guided", "--masking.refresh-epochs", "2", "--augment.roll"],
            ["augment.roll", "masking.refresh_epochs to 0"],
        ),
    ],
)
def test_what_does_not_fit_is_one_message(
    cli: Cli, clips: Path, tmp_path: Path, recipe: str, options: list[str], named: list[str]
) -> None:
    done = started(cli, recipe, clips, tmp_path / "run", *options)
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    for part in named:
        assert part in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_strategy(cli: Cli, clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert started(cli, "mae_ast_patch", clips, out, "--masking", "dispersion").returncode == 0
    done = cli("run", "--resume", str(out), "--masking", "dispersion")
    assert done.returncode == 0, done.stderr
    done = cli("run", "--resume", str(out), "--masking", "self_guided")
    assert done.returncode == 2 and "masking.type" in done.stderr
