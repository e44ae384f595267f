# SPDX-License-Identifier: Apache-2.0
"""The probe of a run: it says what the evaluation says, changes nothing of the run, and goes on when that is resumed."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import torch

from masktrain.cli import _main
from masktrain.errors import DataError
from masktrain.evaluation import monitor
from masktrain.evaluation.labels import LabelledSet, Split, read_labelled
from masktrain.evaluation.monitor import ProbeMonitor, chance, first_split
from masktrain.evaluation.probe import ProbeConfig
from masktrain.models import registry
from masktrain.recipes import find

STEPS = 8
BASE = ["run", "--recipe", "mae_ast_frame", *runs.SMALL, "--steps", str(STEPS), "--checkpoint-every", "4"]


def call(*arguments: str | Path) -> tuple[int, str, str]:
    """Return exit status, standard output and standard error of `masktrain ARGUMENTS`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = _main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_clips(tmp_path_factory.mktemp("audio") / "clips")


def write_manifest(path: Path, clips: Path, columns: tuple[str, ...] = ("label", "fold")) -> Path:
    """Label the clips by their sample rate, which is heard, in two folds."""
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["path", *columns])
        for i, clip in enumerate(sorted(clips.iterdir())):
            values = {"label": f"rate {i % 3}", "fold": 1 + (i // 3) % 2, "other": f"o{i % 2}", "same": "s"}
            table.writerow([clip, *(values[name] for name in columns)])
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    return write_manifest(tmp_path_factory.mktemp("labels") / "labelled.csv", clips)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    out = tmp_path_factory.mktemp("runs") / "plain"
    assert call(*BASE, "--data", clips, "--out", out)[0] == 0
    return out


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory, clips: Path, labelled: Path) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs") / "probed"
    status, said, _ = call(
        *BASE, "--data", clips, "--out", out, "--probe-data", labelled, "--probe-every", "3"
    )
    assert status == 0
    return out, said


def step_rows(run: Path) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in runs.EXACT) for row in runs.rows(run) if "loss" in row]


def readings(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["probe_value"]) for row in runs.rows(run) if "probe_value" in row]


def test_a_run_computes_the_same_with_a_probe(undisturbed: Path, probed: tuple[Path, str]) -> None:
    run = probed[0]
    assert [step for step, _ in readings(run)] == [0, 3, 6, STEPS]
    assert readings(undisturbed) == []
    assert step_rows(run) == step_rows(undisturbed) and len(step_rows(run)) == STEPS
    ours, theirs = runs.tensors(run), runs.tensors(undisturbed)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name] != theirs[name]]


def test_readings_are_shown_with_their_cost(probed: tuple[Path, str], clips: Path) -> None:
    run, said = probed
    assert "4 readings, one every 3 steps" in said and "transductive: " in said
    values = dict(readings(run))
    for step, value in values.items():
        assert f"knn probe after {step} steps: accuracy {100 * value:.1f} %" in said
    # the last known one stands in the line of every step
    for step, shown in ((1, 0), (3, 0), (4, 3), (STEPS, 6)):
        line = next(text for text in said.splitlines() if text.startswith(f"step {step}/{STEPS}"))
        assert f"knn {100 * values[shown]:.1f} %" in line
    summary = json.loads((run / "summary.json").read_text())
    assert [(row["step"], row["probe_value"]) for row in summary["probe"]] == readings(run)
    seconds = [row["probe_seconds"] for row in summary["probe"]]
    assert min(seconds) > 0
    last = summary["probe"][-1]
    # its share is that of all readings in what the run had taken so far
    assert 0 < last["probe_share"] < 1
    assert sum(seconds) / last["probe_share"] <= summary["seconds"] + 1
    assert "No checkpoint was chosen by it" in said and f"{len(seconds)} readings took" in said


def test_readings_are_in_tensorboard(probed: tuple[Path, str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(probed[0] / "tb"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("probe/knn_accuracy")]
    assert found == [(step, pytest.approx(value)) for step, value in readings(probed[0])]
    assert "probe/share" in events.Tags()["scalars"] and "probe/seconds" in events.Tags()["scalars"]


def test_the_last_reading_is_what_the_evaluation_says(
    probed: tuple[Path, str], labelled: Path, tmp_path: Path
) -> None:
    run, report = probed[0], tmp_path / "knn.json"
    arguments = ("--data", labelled, "--device", "cpu", "--cache", tmp_path, "--json", report)
    assert call("evaluate", "knn", "--checkpoint", run, *arguments)[0] == 0
    rows = json.loads(report.read_text())["encoders"][0]["scores"]
    row = next(row for row in rows if row["k"] == 20 and row["vote"] == "weighted")
    assert row["scores"][0] == readings(run)[-1][1]


def test_the_rank_of_a_run_is_reported(probed: tuple[Path, str], clips: Path, tmp_path: Path) -> None:
    arguments = ("--data", clips, "--device", "cpu", "--out", tmp_path / "out", "--untrained")
    status, said, err = call("evaluate", "rank", "--checkpoint", probed[0], *arguments, "--clips", "12")
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "rank.json").read_text())
    assert report["clips"] == 12 and len(report["encoders"]) == 2
    for encoder in report["encoders"]:
        assert [row["mask"] for row in encoder["ranks"]] == ["none", "random", "time_frequency"]
        for row in encoder["ranks"]:
            values = np.array(row["singular_values"])
            shares = values[values > 0] / values.sum()
            assert row["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
            assert f"effective rank {row['effective_rank']:.2f}" in said
    assert (tmp_path / "out" / "rank.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_evaluated_is_refused(
    probed: tuple[Path, str], labelled: Path, clips: Path, tmp_path: Path
) -> None:
    unfolded = write_manifest(tmp_path / "unfolded.csv", clips, ("label",))
    knn, rank = (("evaluate", action, "--device", "cpu") for action in ("knn", "rank"))
    run = ("--checkpoint", probed[0])
    for arguments, told in (
        ((*knn, *run, "--data", unfolded), "fold"),
        ((*knn, *run, "--data", labelled, "--k", "0"), "--k"),
        ((*knn, *run, "--data", labelled, "--temperature", "0"), "--temperature"),
        ((*knn, "--checkpoint", tmp_path / "nowhere", "--data", labelled), "nowhere"),
        ((*rank, "--checkpoint", tmp_path, "--data", clips), str(tmp_path)),
        ((*rank, *run, "--data", clips, "--clips", "1"), "--clips"),
        ((*rank, *run, "--data", clips, "--mask-ratio", "1"), "mask_ratio"),
        ((*rank, *run, "--data", clips, "--encode-batch", "0"), "--encode-batch"),
    ):
        status, _, err = call(*arguments)
        assert status == 2 and told in err and "Traceback" not in err, (arguments, err)


def test_a_resumed_run_goes_on_with_its_probe(probed: tuple[Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(probed[0], run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    status, said, err = call("run", "--resume", run)
    assert status == 0, err
    assert readings(run) == readings(probed[0])
    assert step_rows(run) == step_rows(probed[0])
    ours, theirs = runs.tensors(run), runs.tensors(probed[0])
    assert not [name for name in ours if ours[name] != theirs[name]]
    # the line of the first step shows the reading from before
    line = next(text for text in said.splitlines() if text.startswith(f"step 5/{STEPS}"))
    assert f"knn {100 * dict(readings(run))[3]:.1f} %" in line


def test_a_resumed_run_may_drop_its_probe_and_change_nothing_of_it(
    probed: tuple[Path, str], labelled: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(probed[0], run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    for arguments in (["--probe-every", "5"], ["--probe", "linear"], ["--probe-data", run]):
        status, _, err = call("run", "--resume", run, *arguments)
        assert status == 2 and "nothing else may differ" in err and "probe" in err, (status, err)
    status, _, err = call("run", "--resume", run, "--probe", "off")
    assert status == 0, err
    assert [step for step, _ in readings(run)] == [0, 3]
    assert step_rows(run) == step_rows(probed[0])


def test_a_reading_that_fails_does_not_end_the_run(
    clips: Path, labelled: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ProbeMonitor.read

    def failing(self: ProbeMonitor, step: Any, done: int) -> Any:
        if done == 4:
            raise DataError("clip7.wav: gone")
        return read(self, step, done)

    monkeypatch.setattr(ProbeMonitor, "read", failing)
    arguments = ("--data", clips, "--out", tmp_path / "run", "--probe-data", labelled, "--probe-every", "4")
    status, said, _ = call(*BASE, *arguments, "--probe", "linear")
    assert status == 0 and "no reading of the probe after 4 steps: clip7.wav: gone" in said
    assert [step for step, _ in readings(tmp_path / "run")] == [0, STEPS]
    assert step_rows(tmp_path / "run") == step_rows(undisturbed)
    assert {row["probe_kind"] for row in runs.rows(tmp_path / "run") if "probe_kind" in row} == {"linear"}


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_reading_leaves_the_model_and_all_random_states(
    kind: str, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "ProbeConfig", partial(ProbeConfig, epochs=3))
    recipe = find("mae_ast_patch", "tiny")  # its input norm has running statistics
    torch.manual_seed(0)
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm).train()
    model.encoder.eval()  # a part in another mode than the rest
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    step = SimpleNamespace(recipe=recipe, model=model, world=SimpleNamespace(device=torch.device("cpu")))
    probe = ProbeMonitor(read_labelled(labelled), kind, None)
    values = [probe.read(step, done).value for done in (0, 1)]  # type: ignore[arg-type]
    assert values[0] == values[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_readings_are_due_at_both_ends_and_in_between(labelled: Path) -> None:
    data = read_labelled(labelled)
    for every, steps in ((None, 1), (None, 7), (None, 105), (4, 10), (50, 10)):
        probe = ProbeMonitor(data, "knn", every)
        due = [done for done in range(steps + 1) if probe.due(done, steps)]
        assert due[0] == 0 and due[-1] == steps
        gaps = np.diff(due)
        assert (gaps[:-1] == (every or max(1, steps // 10))).all() and len(due) <= 12


def many(labels: np.ndarray[Any, Any], labelled: Path, split: Split) -> LabelledSet:
    data = read_labelled(labelled)
    return LabelledSet(
        **{**vars(data), "labels": labels, "splits": (split,), "classes": tuple("abc"), "groups": None}
    )


def test_a_reading_takes_no_more_clips_than_it_may(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "MOST_TRAIN", 9)
    monkeypatch.setattr(monitor, "MOST_TEST", 5)
    whole = read_labelled(labelled)
    part = first_split(whole)
    split, full = part.splits[0], whole.splits[0]
    assert (len(split.train), len(split.test), len(part.manifest)) == (9, 5, 14)
    by_path = {whole.manifest.path(row): row for row in range(len(whole.manifest))}
    for rows, of in ((split.train, full.train), (split.test, full.test)):
        origin = [by_path[part.manifest.path(row)] for row in rows.tolist()]
        assert set(origin) <= set(of.tolist()) and len(set(origin)) == len(rows)
        assert part.labels[rows].tolist() == whole.labels[origin].tolist()
    assert first_split(whole).manifest.paths == part.manifest.paths


def test_chance_is_what_blind_answers_reach(labelled: Path) -> None:
    rows = np.arange(40)
    split = Split("fold 1", rows[:20], None, rows[20:])
    labels = np.zeros(40, dtype=np.int64)
    labels[20:25], labels[:5] = 1, 2
    assert chance(many(labels, labelled, split)) == 15 / 20
    hot = np.zeros((40, 3), dtype=np.uint8)
    hot[20:25, 0] = hot[20:36, 1] = 1
    assert chance(many(hot, labelled, split)) == pytest.approx((5 / 20 + 16 / 20) / 2)


def test_wrong_probes_are_refused_before_the_run(clips: Path, labelled: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin = [*BASE, "--data", clips, "--out", run]
    unfolded = write_manifest(tmp_path / "unfolded.csv", clips, ("label",))
    one_class = write_manifest(tmp_path / "one.csv", clips, ("same", "fold"))
    for arguments, *told in (
        (["--probe", "knn"], "--probe", "--probe-data"),
        (["--probe-every", "3"], "--probe-every", "--probe-data"),
        (["--probe-data", labelled, "--probe-every", "0"], "--probe-every", "at least 1"),
        (["--probe-data", labelled, "--probe", "off"], "--probe off"),
        (["--probe-data", tmp_path / "nowhere.csv"], "nowhere.csv"),
        (["--probe-data", labelled, "--probe-label", "species"], "species"),
        (["--probe-data", unfolded], "unfolded.csv", "fold"),
        (["--probe-data", one_class, "--probe-label", "same"], "class"),
    ):
        status, _, err = call(*begin, *map(str, arguments))
        assert status == 2 and "Traceback" not in err, arguments
        assert all(text in err for text in told), err
        assert not run.exists()
