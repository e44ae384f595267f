# SPDX-License-Identifier: Apache-2.0
"""`masktrain data`: statistics against a direct float64 computation, the canonical manifest, the demo corpus."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import soundfile
import torch

from masktrain.data.index import index_manifest
from masktrain.data.order import order
from masktrain.data.readers import load_manifest
from masktrain.errors import ConfigError, DataError
from masktrain.frontend.presets import preset
from masktrain.kernels.log_mel import log_mel
from masktrain.kernels.resample import resample
from masktrain.training.statistics import measure_statistics

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def direct(paths: list[Path], name: str) -> np.ndarray:
    """Return the frames of whole files, each on its own, in float64."""
    front = preset(name)
    out = []
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        wave = torch.from_numpy(samples.astype(np.float64).mean(1))
        wave, lengths = resample(wave, (len(wave),), (rate,), front.sample_rate, dtype=torch.float64)
        out.append(log_mel(wave, lengths, front.mel, dtype=torch.float64)[0].numpy())
    return np.concatenate(out)


def check_against_direct(report: dict[str, Any], frames: np.ndarray) -> None:
    assert report["frames"] == len(frames)
    assert report["dataset_mean"] == pytest.approx(frames.mean(), abs=1e-4)
    assert report["dataset_std"] == pytest.approx(frames.std(), abs=1e-4)
    np.testing.assert_allclose(report["bin_mean"], frames.mean(0), atol=1e-3)
    np.testing.assert_allclose(report["bin_std"], frames.std(0), atol=1e-3)


@pytest.mark.parametrize("name", ["mae_ast", "audiomae", "m2d"])
def test_statistics_are_those_of_all_frames(cli: Cli, tmp_path: Path, good: Path, name: str) -> None:
    done = cli("data", "stats", good, "--frontend", name, "--json", tmp_path / "stats.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "stats.json").read_text())
    check_against_direct(report, direct(sorted(good.iterdir()), name))
    assert report["clips"] == 40 and report["bad_clips"] == []
    assert f"{report['dataset_mean']:.6f}" in done.stdout and f"{report['dataset_std']:.6f}" in done.stdout


def test_statistics_of_real_audio(cli: Cli, tmp_path: Path, data_dir: Path) -> None:
    with open(data_dir / "esc10.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    # two digits with the recordings: both rates, short and long
    few = [data_dir / row["path"] for row in rows[::80]] + [
        data_dir / "fsdd" / f"{i}_george_0.wav" for i in range(2)
    ]
    (tmp_path / "few.csv").write_text("\n".join(["path", *map(str, few)]) + "\n")
    done = cli("data", "stats", tmp_path / "few.csv", "--json", tmp_path / "stats.json")
    assert done.returncode == 0, done.stderr
    check_against_direct(json.loads((tmp_path / "stats.json").read_text()), direct(few, "mae_ast"))


def test_some_clips_are_drawn_by_seed(good: Path) -> None:
    manifest, _ = index_manifest(load_manifest([good])[0])
    seen: list[tuple[int, int]] = []
    front = preset("mae_ast")
    some = measure_statistics(manifest, front, clips=7, seed=3, progress=lambda *at: seen.append(at))
    chosen = [Path(manifest.path(row)) for row in order(3, 0, 40)[:7]]
    frames = direct(chosen, "mae_ast")
    assert some.clips == 7 and some.statistics.frames == len(frames)
    assert some.statistics.dataset_mean == pytest.approx(frames.mean(), abs=1e-4)
    assert seen[-1] == (7, 7)
    other = measure_statistics(manifest, front, clips=7, seed=4)
    assert other.statistics != some.statistics
    everything = measure_statistics(manifest, front, clips=40, seed=4)
    assert everything.statistics == measure_statistics(manifest, front).statistics
    for clips in (0, 41):
        with pytest.raises(ConfigError, match="--clips"):
            measure_statistics(manifest, front, clips=clips)


def test_long_files_are_cut_as_a_run_cuts_them(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000 * 5), 16000)
    manifest, _ = index_manifest(load_manifest([tmp_path])[0])
    front = preset("mae_ast")
    assert measure_statistics(manifest, front, clip_seconds=1.0).statistics.frames == 98
    assert measure_statistics(manifest, front, clip_seconds=None).statistics.frames == 498


def test_bad_clips_are_left_out_of_the_statistics(cli: Cli, tmp_path: Path, good: Path) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "text.wav").write_text("no sound")
    soundfile.write(bad / "nan.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    done = cli("data", "stats", good, bad, "--json", tmp_path / "stats.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "stats.json").read_text())
    assert {Path(clip["path"]).name for clip in report["bad_clips"]} == {"text.wav", "nan.wav"}
    assert str(bad / "text.wav") in done.stdout and str(bad / "nan.wav") in done.stdout
    check_against_direct(report, direct(sorted(good.iterdir()), "mae_ast"))
    for i in range(12):
        soundfile.write(bad / f"{i}.wav", np.full(16000, np.inf), 16000, subtype="FLOAT")
    done = cli("data", "stats", good, bad)
    assert done.returncode == 2 and "clips cannot be used; at most 10" in done.stderr


def test_a_run_on_the_canonical_manifest_is_the_same_run(cli: Cli, tmp_path: Path, data_dir: Path) -> None:
    lists = [data_dir / "esc10.csv", data_dir / "fsdd.csv"]
    done = cli("data", "index", *lists, "-o", tmp_path / "clips.tsv", "--json", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["clips"] == 3400 and report["manifest"] == str(tmp_path / "clips.tsv")
    assert (os.stat(tmp_path / "report.json").st_mode & 0o077) == (
        os.stat(tmp_path / "clips.tsv").st_mode & 0o077
    )
    arguments = ["run", "--recipe", "mae_ast_frame", *runs.SMALL, "--train.pictures", "0", "--steps", "3"]
    arguments += ["--train.validation-clips", "2"]
    done = cli(*arguments, "--data", lists[0], "--data", lists[1], "--out", tmp_path / "lists")
    assert done.returncode == 0, done.stderr
    done = cli(*arguments, "--data", tmp_path / "clips.tsv", "--out", tmp_path / "canonical")
    assert done.returncode == 0, done.stderr
    assert runs.trace(tmp_path / "canonical") == runs.trace(tmp_path / "lists")
    assert len({row["clip_ids"] for row in runs.rows(tmp_path / "lists")}) == 3


def test_index_into_nowhere(cli: Cli, tmp_path: Path, good: Path) -> None:
    done = cli("data", "index", good, "-o", tmp_path / "absent" / "clips.tsv")
    assert done.returncode == 2 and "absent/clips.tsv" in done.stderr and done.stderr.count("\n") == 1


def test_names_that_no_terminal_shows(cli: Cli, tmp_path: Path, good: Path) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    clips = sorted(good.iterdir())
    for clip, name in zip(clips, ("a\nb.wav", "c\x1b[31m.wav", "d\udcff.wav", "e\u2028.wav"), strict=False):
        os.link(clip, folder / name)
    environment = {**runs.environment(), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(
        [*runs.COMMAND, "data", "stats", str(folder)], capture_output=True, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert b"\x1b" not in done.stdout and b"1 files are left out" in done.stdout and b"3 clips" in done.stdout


# --- the demo corpus ---


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a demo corpus that two processes make at once."""
    folder = tmp_path_factory.mktemp("demo")
    both = [runs.start("data", "demo", "-o", folder) for _ in range(2)]
    for process in both:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0 and errors == "", errors
        assert str(folder / "demo-0" / "demo.csv") in output
    return folder


@pytest.mark.slow(
    covers=["masktrain/data/demo.py", "masktrain/data/synth.py", "masktrain/training/corpus.py"]
)
def test_two_processes_make_one_demo_corpus(demo: Path) -> None:
    assert [path.name for path in demo.iterdir()] == ["demo-0"]
    manifest, bad = index_manifest(load_manifest([demo / "demo-0" / "demo.csv"])[0])
    assert len(manifest) == 210 and not bad


@pytest.mark.slow(
    covers=["masktrain/data/demo.py", "masktrain/data/synth.py", "masktrain/training/corpus.py"]
)
def test_the_demo_corpus_is_made_once(cli: Cli, demo: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    assert cli("data", "demo", "-o", demo).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in demo.rglob("*")} == before


@pytest.mark.parametrize("cache", ["XDG_CACHE_HOME", "HOME", "none"])
def test_where_the_demo_corpus_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    """A cache that cannot be written, or no home at all: a temporary folder serves."""
    from masktrain.training import corpus

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if cache == "none":

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", staticmethod(homeless))
    else:
        monkeypatch.setenv(cache, str(tmp_path / "file"))
    assert corpus.demo_folder().parent == tmp_path / "tmp"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpus.demo_folder() == tmp_path / "masktrain" / "demo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert corpus.demo_folder().is_absolute()


@pytest.mark.slow(
    covers=["masktrain/data/demo.py", "masktrain/data/synth.py", "masktrain/training/corpus.py"]
)
def test_a_run_without_a_home(demo: Path, tmp_path: Path) -> None:
    environment = {k: v for k, v in runs.environment().items() if k not in ("HOME", "XDG_CACHE_HOME")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    (tmp_path / "cache" / "masktrain" / "demo").mkdir(parents=True)
    (demo / "demo-0").rename(tmp_path / "cache" / "masktrain" / "demo" / "demo-0")
    try:
        command = [
            *runs.COMMAND,
            "run",
            "--recipe",
            "mae_ast_frame",
            *runs.SMALL,
            "--steps",
            "1",
            "--train.pictures",
            "0",
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120
        )
    finally:
        (tmp_path / "cache" / "masktrain" / "demo" / "demo-0").rename(demo / "demo-0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No --data: training on the demo corpus")
    assert len(list((tmp_path / "runs").glob("mae_ast_frame_*/summary.json"))) == 1


def test_too_many_bad_clips_are_a_data_error(tmp_path: Path) -> None:
    for i in range(11):
        soundfile.write(tmp_path / f"{i}.wav", np.full(16000, np.nan), 16000, subtype="FLOAT")
    manifest, _ = index_manifest(load_manifest([tmp_path])[0])
    with pytest.raises(DataError, match="at most 10"):
        measure_statistics(manifest, preset("mae_ast"))
