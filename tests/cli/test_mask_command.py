# SPDX-License-Identifier: Apache-2.0
"""`masktrain mask show`: the masks that it draws are those of the strategies; what cannot be drawn is one message."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from masktrain.cli.mask import _strategies
from masktrain.masking.dispersion import DispersionMasking
from masktrain.masking.plan import visible_count
from masktrain.masking.registry import STRATEGIES
from masktrain.masking.strategies import RandomMasking
from masktrain.recipes import find
from masktrain.training.mask_pictures import (
    PANEL,
    masks_figure,
    read_clip,
    strategy_row,
    untrained_encoder,
)
from masktrain.training.pictures import mask_grids
from masktrain.types import StepKey

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
SEED = 3


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.5 s of noise, then 1.5 s of silence."""
    path = tmp_path_factory.mktemp("mask") / "noise, then nothing.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, 24_000)
    soundfile.write(path, np.concatenate([noise, np.zeros(24_000)]), 16_000)
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, clip: Path) -> Path:
    """A run of one step."""
    from masktrain.cli import _main

    data = tmp_path_factory.mktemp("clips")
    for i in range(4):
        soundfile.write(data / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, 16_000), 16_000)
    out = tmp_path_factory.mktemp("runs") / "run"
    options = "--recipe mae_ast_patch --size tiny --steps 1 --batch-size 4 --train.pictures 0 --device cpu"
    assert _main(["run", *options.split(), "--data", str(data), "--out", str(out)]) == 0
    return out


def size_of(path: Path) -> tuple[int, int]:
    """Width and height that a PNG says it has."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:])
    return width, height


def test_a_picture_of_all_strategies(cli: Cli, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "masks.png"
    done = cli("mask", "show", clip, "--masking", "all", "--hint", "0.5", "-o", out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stdout and f"{len(STRATEGIES)} strategies" in done.stdout
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"))
    rows = 1 + len(STRATEGIES)
    assert pixels.shape[0] > 150 * PANEL[1] * rows
    # The grey of masked tokens takes up much of the page, and it is not all there is.
    grey = (pixels == (0xC9, 0xCE, 0xD6)).all(2).mean()
    assert 0.03 < grey < 0.3


def test_masks_are_those_of_a_run(clip: Path) -> None:
    """Step 0 of a run with this seed; hint ratio 1 is the random mask, ratio 0 keeps the silence visible."""
    recipe = find("mae_ast_patch", "tiny")
    seen = read_clip(clip, recipe, None)
    row = strategy_row(DispersionMasking(mask_ratio=0.4), seen, (0.0, 1.0), SEED)
    own, random = (mask.masked for mask in row.masks)
    plan = RandomMasking(mask_ratio=0.4).plan(seen.layout, StepKey.make(SEED, 0, "cpu"))
    assert np.array_equal(random, mask_grids(plan)[0])
    freq, columns = own.shape
    assert own.sum() == freq * columns - visible_count(freq * columns, 0.4)
    silent = row.values < 1e-3
    assert silent.sum() > freq * columns // 3
    assert not own[silent].any() and random[silent].any()


def test_a_share_is_that_of_the_draws(clip: Path) -> None:
    recipe = find("mae_ast_patch", "tiny")
    row = strategy_row(RandomMasking(mask_ratio=0.75), read_clip(clip, recipe, None), (0.0, 0.5), SEED)
    assert row.is_share and len(row.masks) == 2
    assert not np.array_equal(row.masks[0].masked, row.masks[1].masked)
    assert np.isclose(row.values.mean(), row.masks[0].masked.mean())
    # 200 draws: each share within 5 standard deviations.
    assert np.abs(row.values - row.values.mean()).max() < 5 * (0.75 * 0.25 / 200) ** 0.5


@pytest.mark.parametrize(("padding", "columns"), [("none", 18), ("reference", 62)])
def test_length_policy_of_the_recipe(padding: str, columns: int, clip: Path) -> None:
    from dataclasses import replace

    recipe = find("mae_ast_patch", "tiny")
    recipe = replace(recipe, data=replace(recipe.data, padding=padding))
    seen = read_clip(clip, recipe, None)
    assert seen.layout.columns == (columns,)
    assert seen.seconds == 3.0 and seen.whole_seconds == 3.0


def test_what_the_picture_says(clip: Path) -> None:
    recipe = find("msm_mae", "tiny")
    encoder = untrained_encoder(recipe)
    seen = read_clip(clip, recipe, encoder)
    rows = [strategy_row(STRATEGIES[name](), seen, (0.0, 0.5, 1.0), SEED) for name in ("time", "self_guided")]
    figure = masks_figure([(seen, rows)], recipe, 3, "a title", encoder.name)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert any("noise, then nothing.wav" in title for title in titles)
    assert any(title.startswith("self_guided: similarity to foreground") for title in titles)
    assert {"hint ratio 0.5", "draw 3"} <= {title.split(":")[0] for title in titles}
    assert {axes.get_ylabel() for axes in figure.axes} >= {"frequency (Hz)", "dB", "share", "score"}
    assert "time (s)" in {axes.get_xlabel() for axes in figure.axes}
    assert figure.legends[0].get_texts()[0].get_text() == "masked token"
    assert "UNTRAINED" in figure.get_supxlabel()


def test_features_of_a_checkpoint(cli: Cli, clip: Path, trained: Path, tmp_path: Path) -> None:
    """The same strategy with and without it: other features, another picture."""
    pictures = []
    for name, options in (
        ("run", ["--checkpoint", trained]),
        ("fresh", []),
    ):
        out = tmp_path / f"{name}.png"
        done = cli("mask", "show", clip, "--masking", "self_guided", "--hint", "0", "-o", out, *options)
        assert done.returncode == 0, done.stderr
        pictures.append(out.read_bytes())
    assert pictures[0] != pictures[1]


def test_options_of_a_strategy(cli: Cli, clip: Path, tmp_path: Path) -> None:
    sizes, pictures = [], []
    for options in ([], ["--dispersion.mask-ratio", "0.4"], ["--dispersion.weight", "variance"]):
        out = tmp_path / "masks.png"
        done = cli("mask", "show", clip, "--masking", "dispersion", "--hint", "0", "-o", out, *options)
        assert done.returncode == 0, done.stderr
        sizes.append(size_of(out))
        pictures.append(out.read_bytes())
    assert len(set(sizes)) == 1 and len(set(pictures)) == 3


def test_the_same_masks_each_time(clip: Path) -> None:
    recipe = find("mae_ast_patch", "tiny")
    encoders = [untrained_encoder(recipe) for _ in range(2)]
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    rows = [
        strategy_row(STRATEGIES["self_guided"](), read_clip(clip, recipe, encoder), (0.0, 0.5), SEED)
        for encoder in encoders
    ]
    assert np.array_equal(rows[0].values, rows[1].values)
    assert all(np.array_equal(a.masked, b.masked) for a, b in zip(rows[0].masks, rows[1].masks, strict=True))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["draw"], ["mask: no action 'draw'", "Allowed: show"]),
        (["show"], ["no audio file was named"]),
        (["show", "absent.wav"], ["absent.wav", "no such file"]),
        (["show", "CLIP", "--masking", "rondom"], ["'rondom'", "Did you mean 'random'?"]),
        (["show", "CLIP", "--masking", ""], ["''", "allowed: random"]),
        (["show", "CLIP", "--hint", "0,2"], ["--hint", "from 0 to 1", "'0,2'"]),
        (["show", "CLIP", "--hint", "half"], ["--hint", "'half'"]),
        (["show", "CLIP", "--out", "masks.pdf"], ["masks.pdf", ".png"]),
        (["show", "CLIP", "--out", "absent/masks.png"], ["--out absent/masks.png", "cannot be written"]),
        (["show", "CLIP", "--seed", "-1"], ["--seed", "-1"]),
        (["show", "CLIP", "--recipe", "mae_ast"], ["no recipe 'mae_ast'"]),
        (["show", "CLIP", "--size", "huge"], ["no size 'huge'"]),
        (["show", "CLIP", "--checkpoint", "absent"], ["absent: no such folder"]),
        (["show", "CLIP", "--checkpoint", "a", "--recipe", "maskspec"], ["give one of the two"]),
        (["show", "CLIP", "--masking", "dispersion", "--dispersion.hint.gamma", "3"], ["--hint 0,0.5,1"]),
        (["show", "CLIP", "--masking", "dispersion", "--dispersion.wait", "mad"], ["--dispersion.wait"]),
        (["show", "CLIP", "--masking", "random", "--random.mask-ratio", "2"], ["mask_ratio", "2"]),
        (["show", "CLIP", "--masking", "inverse_block", "--recipe", "mae_ast_frame"], ["one row"]),
        (["show", "CLIP", "--masking", "self_guided", "--self-guided.layer", "99"], ["masking.layer: 99"]),
        (["show", *["CLIP"] * 12], ["60 rows", "holds 40"]),
    ],
)
def test_refuses(arguments: list[str], named: list[str], cli: Cli, clip: Path, tmp_path: Path) -> None:
    given = [str(clip) if a == "CLIP" else a for a in arguments]
    out = [] if "--out" in arguments else ["-o", str(tmp_path / "m.png")]
    done = cli("mask", *given, *(out if arguments[0] == "show" else []))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1 and all(text in done.stderr for text in named), done.stderr


def test_all_are_those_that_fit() -> None:
    names = {masking.name for masking in _strategies(find("mae_ast_frame", "tiny"), "all", [])}
    assert {"random", "frame", "dispersion", "self_guided"} <= names
    assert set(STRATEGIES) - names == {"frequency", "inverse_block"}


@pytest.mark.parametrize("content", [b"", b"no audio at all", b"RIFF\0\0\0\0WAVE"])
def test_a_file_that_is_no_audio(content: bytes, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    done = cli("mask", "show", path, "--masking", "random", "-o", tmp_path / "m.png")
    assert done.returncode == 2 and "bad.wav" in done.stderr
    assert not (tmp_path / "m.png").exists()


def test_a_clip_without_a_token(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "short.wav"
    soundfile.write(path, np.zeros(800), 16_000)
    done = cli("mask", "show", path, "--masking", "random", "-o", tmp_path / "m.png")
    assert done.returncode == 2 and "short.wav" in done.stderr
