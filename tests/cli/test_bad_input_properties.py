# SPDX-License-Identifier: Apache-2.0
"""Whatever manifests and options hold, a command ends with status 0 or 2 and one message, and with no exception.

Training is left out: it begins where `train` is called, with a run that is described completely.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from masktrain.cli.options import _options
from masktrain.cli.run import Options
from masktrain.config import flatten, from_dict, to_dict
from masktrain.errors import MasktrainError
from masktrain.models import registry
from masktrain.recipes import RECIPES, find
from masktrain.training import schedule, trainer
from masktrain.training.recipe import Recipe
from masktrain.training.run_spec import RunSpec

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
# a fixture of the function would do for one example only; these hold for all
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

RUN_FLAGS = sorted(set(_options(Options)) | set(_options(find("mae_ast_patch", "tiny"))) - {"--json"})
VALUES = st.one_of(
    st.sampled_from(
        ["none", "None", "true", "tiny", "auto", "cpu", "random", "nan", "inf", "-inf", "1e999", "", "-", "="]
    ),
    st.sampled_from(
        ["0", "-0", "-1", "1", "2", "16", "0x10", "1_000", "1e3", ".5", "-.5", "1e-400", "9" * 30, "\uff11"]
    ),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0"), max_size=6),
)


@st.composite
def option_lists(draw: st.DrawFn) -> list[str]:
    """Draw options of run: known ones, misspelt ones and none, with values that fit or do not."""
    out: list[str] = []
    for _ in range(draw(st.integers(0, 4))):
        flag = draw(st.sampled_from(RUN_FLAGS) | st.text("-abemorst.=", min_size=1, max_size=9))
        if draw(st.integers(0, 5)) == 0 and len(flag) > 4:
            at = draw(st.integers(2, len(flag) - 1))
            flag = flag[:at] + flag[at + 1 :]
        if draw(st.booleans()):
            flag = flag.replace("-", "_").replace("__", "--", 1)
        values = draw(st.lists(VALUES, max_size=3))
        out += [f"{flag}={values[0]}"] if values and draw(st.booleans()) else [flag, *values]
    return out


def checked(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode in (0, 2), done.stderr
    if done.returncode == 2:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
        assert lines[0].startswith("masktrain: ") and len(lines[0]) > 20
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def asked() -> Iterator[list[RunSpec]]:
    """What would have been trained."""
    specs: list[RunSpec] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train", lambda spec, summary=None, monitor=None: specs.append(spec))
        yield specs


@settings(SETTINGS, max_examples=150)
@example(arguments=["--batch-size", "8", "--seed"])
@example(arguments=["--optim.betas", "0.9", "--seed=3"])
@example(arguments=["--model.heads", "0"])
@example(arguments=["--tokens.patch-time", "0"])
@example(arguments=["--optim.lr", "nan", "--json", "/proc/x"])
@given(arguments=option_lists())
def test_any_options_are_a_run_or_one_message(
    cli: Cli, good: Path, asked: list[RunSpec], arguments: list[str]
) -> None:
    if any(a in ("-h", "--help") or a.startswith("--out") for a in arguments):
        return
    asked.clear()
    done = cli(
        "run", "--recipe", "mae_ast_patch", "--size", "tiny", "--device", "cpu", "--data", good, *arguments
    )
    checked(done)
    assert len(asked) == (done.returncode == 0)
    for spec in asked:
        # what was accepted can be stored, read again and begun
        assert from_dict(Recipe, json.loads(json.dumps(to_dict(spec.recipe)))) == spec.recipe or any(
            value != value for value in flatten(spec.recipe).values()
        )


@settings(SETTINGS, max_examples=60)
@given(data=st.data())
def test_one_override_takes_effect_and_no_other(
    cli: Cli, good: Path, asked: list[RunSpec], data: st.DataObject
) -> None:
    """A number that is accepted is the recipe's; the other fields are as they were, and the run can be begun."""
    parent = find(data.draw(st.sampled_from(sorted(RECIPES))), "tiny")
    numbers = {
        name: value
        for name, value in flatten(parent).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "." in name
    }
    name = data.draw(st.sampled_from(sorted(numbers)))
    small = st.integers(-2, 40) if isinstance(numbers[name], int) else st.floats(-2, 2) | st.floats()
    value = data.draw(small)
    asked.clear()
    flag = f"--{name.replace('_', '-')}={value!r}"
    done = cli("run", "--recipe", parent.name, "--size", "tiny", "--device", "cpu", "--data", good, flag)
    checked(done)
    for spec in asked:
        ours, theirs = flatten(spec.recipe), flatten(parent)
        assert ours[name] == value or value != value
        assert {k: v for k, v in ours.items() if k != name} == {k: v for k, v in theirs.items() if k != name}
        with suppress(MasktrainError):  # two fields that do not fit together, in words
            registry.build(spec.recipe.model, spec.recipe.grid, spec.recipe.input_norm)
            schedule.resolve(spec.recipe.schedule, 10, spec.recipe.optim.peak_lr(spec.recipe.batch_size))


@settings(SETTINGS, max_examples=60)
@given(
    command=st.sampled_from(
        ["recipes", "data", "doctor", "run", "help", "data index", "data stats", "recipes show", ""]
    ),
    words=st.lists(
        st.text("-abcdelmnorstu=. ", max_size=7) | st.sampled_from(["--json", "-o", "list"]), max_size=3
    ),
)
def test_any_words_are_a_command_or_one_message(
    cli: Cli,
    asked: list[RunSpec],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    words: list[str],
) -> None:
    asked.clear()
    monkeypatch.chdir(tmp_path)  # what is written is written here
    checked(cli(*command.split(), *words))
    assert not asked


CELLS = st.one_of(
    st.sampled_from(
        ["clip000.flac", "clip001.wav", "./clip002.flac", "../clips/clip003.wav", "absent.wav", "", ".", "/"]
    ),
    st.sampled_from(["16000", "-1", "0", "1e9", "9" * 25, "x", '"', '"a', "\t", ",", "path", "label", "nan"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a manifest: CSV, TSV, canonical, list, AST JSON or fairseq, rows at random, then damage."""
    kind = draw(st.sampled_from(["csv", "tsv", "canonical", "list", "json", "fairseq"]))
    rows = draw(st.lists(st.lists(CELLS, min_size=1, max_size=4), max_size=6))
    good_rows = [[f"clip{i:03d}.{'wav' if i % 2 else 'flac'}", "x"] for i in range(draw(st.integers(0, 5)))]
    rows = draw(st.permutations(rows + good_rows))
    if kind == "json":
        key = draw(st.sampled_from(["wav", "wave", "path"]))
        items: Any = [{key: row[0], "labels": row[1:]} for row in rows]
        content = json.dumps({draw(st.sampled_from(["data", "date"])): items})
    else:
        separator = "," if kind == "csv" else "\t"
        head = {
            "csv": ["path", "label"],
            "tsv": ["file", "label"],
            "canonical": ["path", "num_samples", "sample_rate_hz"],
        }
        table = [head.get(kind, ["."] if kind == "fairseq" else []), *rows]
        content = "\n".join(separator.join(row) for row in table if row)
    raw = bytearray(content.encode())
    for _ in range(draw(st.integers(0, 2))):
        if raw:
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


@settings(SETTINGS, max_examples=150)
@example(content=b"", suffix="csv")
@example(content=b"\xef\xbb\xbfpath\nclip000.flac\n", suffix="csv")
@example(
    content=b"path\tnum_samples\tsample_rate_hz\nclip000.flac\t100000000000000000000\t16000\n", suffix="tsv"
)
@given(content=manifests(), suffix=st.sampled_from(["csv", "tsv", "json", "txt"]))
def test_any_manifest_is_clips_or_one_message(cli: Cli, good: Path, content: bytes, suffix: str) -> None:
    source = good / f"manifest.{suffix}"
    target = good.parent / "canonical.tsv"
    target.unlink(missing_ok=True)
    source.write_bytes(content)
    try:
        done = cli("data", "index", source, "-o", target)
        checked(done)
        assert target.exists() == (done.returncode == 0)
        if target.exists():
            # what was written reads back as the same clips
            clips = target.read_bytes().count(b"\n") - 1
            again = cli("data", "index", target, "-o", good.parent / "again.tsv")
            assert again.returncode == 0 and clips >= 1, again.stderr
            assert (good.parent / "again.tsv").read_bytes() == target.read_bytes()
    finally:
        source.unlink()
