# SPDX-License-Identifier: Apache-2.0
"""Verification and benchmarks of kernels: what is right passes, what is broken is found, and the exit status says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from masktrain.cli import _main, doctor
from masktrain.kernels._dispatch import Implementation
from masktrain.kernels.mask_scatter import op as mask_scatter
from masktrain.kernels.mask_scatter import reference as scatter_reference
from masktrain.kernels.select_tokens import op as select_tokens
from masktrain.kernels.select_tokens import reference as select_reference
from masktrain.recipes import distinct, find
from masktrain.training import measure, op_cases
from masktrain.training import verify as verifying
from masktrain.training.bench import bench_case, provenance
from masktrain.training.measure import Ceilings, Stopwatch, share, timing
from masktrain.training.op_cases import (
    ALL,
    OPS,
    REPRESENTATIVES,
    Case,
    Problem,
    cases,
    ops_of,
    representative_ops,
)
from masktrain.training.verify import DEFINITION, OK, UNAVAILABLE, WRONG, verify_case

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found() -> dict[str, list[Case]]:
    """The float32 cases of a small batch, by op."""
    out: dict[str, list[Case]] = {}
    for case in cases(Problem(find("mae_ast_patch", "tiny"), CPU, 2, 48), [torch.float32]):
        out.setdefault(case.op, []).append(case)
    return out


def inject(
    monkeypatch: pytest.MonkeyPatch, module: Any, function: Callable[..., Any], reason: str | None = None
) -> None:
    broken = Implementation("native", function, lambda *_: reason, lambda *_: "only when asked for")
    kept = tuple(i for i in module.IMPLEMENTATIONS if i.name != "native")
    monkeypatch.setattr(module, "IMPLEMENTATIONS", (broken, *kept))


def test_every_op_of_a_step_has_cases_and_all_are_right(found: dict[str, list[Case]]) -> None:
    assert set(found) == set(OPS) - {"window_attention"}
    for op, of_op in found.items():
        for case in of_op:
            for verdict in verify_case(case, ["native", "reference"]):
                assert verdict.status in (OK, DEFINITION, UNAVAILABLE), verdict
                assert (verdict.status == OK) == (verdict.error_ratio is not None), op


@pytest.mark.parametrize("recipe", ["mae_ast_frame", "maskspec", "msm_mae_orig", "ssast_patch"])
def test_ops_of_a_recipe_are_those_of_its_cases(recipe: str) -> None:
    """By its masks, its objective and its dropout; sizes are those of its model, class tokens included."""
    problem = Problem(find(recipe, "tiny"), CPU, 2, 48)
    made = list(cases(problem, [torch.float32]))
    ops = {case.op for case in made}
    assert ops == set(ops_of(problem.recipe))
    assert ("patch_info_nce" in ops) == (not recipe.startswith(("maskspec", "msm_mae")))
    leading = {"maskspec": 1, "msm_mae_orig": 1, "ssast_patch": 2}.get(recipe, 0)
    seen = problem.layout.lengths if recipe.startswith("ssast") else problem.plan.n_visible
    attention = [case.packing for case in made if case.op == "varlen_attention" and "encoder" in case.variant]
    for packing in attention:
        assert packing is not None and packing[1] == tuple(n + leading for n in seen)
        assert packing[0].tolist()[-1] == sum(packing[1]) and packing[0].dtype == torch.int32
    assert len(attention) == (2 if recipe.startswith("mae_ast") else 1)


def test_representatives_cover_all_ops_and_recipes() -> None:
    """A new recipe has to say which of its ops are of a new form; what it names it must have."""
    assert set(REPRESENTATIVES) == set(distinct())
    covered = {op for name in REPRESENTATIVES for op in representative_ops(find(name))}
    assert covered == set(OPS)
    for name, named in REPRESENTATIVES.items():
        assert named == ALL or set(named) <= set(ops_of(find(name))), name
    assert representative_ops(find("maskspec_tiny")) == ()


def test_cases_of_another_form_are_other_cases() -> None:
    """Of the same sizes, but with tokens counted otherwise, another front end, or another softmax."""
    made = {}
    for name in REPRESENTATIVES:
        ops = representative_ops(find(name))
        for case in cases(Problem(find(name, "tiny"), CPU, 1, 64), [torch.float32]):
            if case.op in ops:
                made.setdefault((name, case.op), set()).add(case.signature)
    for names in (("mae_ast_patch", "maskspec"), ("mae_ast_frame", "ssast_frame")):
        for op in ("mask_gather", "masked_patch_loss", "patch_mad"):
            assert not made[names[0], op] & made[names[1], op]
    assert not made["mae_ast_frame", "patch_info_nce"] & made["ssast_patch", "patch_info_nce"]
    front_ends = [made[name, "log_mel"] for name in ("mae_ast_frame", "maskspec", "audiomae", "msm_mae")]
    assert len(set.union(*front_ends)) == len(front_ends)


def off_by_one(x: Any, token: Any, visible: Any, masked: Any) -> Any:
    return scatter_reference.mask_scatter(x, token, visible, masked).roll(1, 0)


def wrong_gradient(x: Any, token: Any, visible: Any, masked: Any) -> Any:
    out = scatter_reference.mask_scatter(x, token, visible, masked)
    return out + 1e-3 * (x - x.detach()).sum()


def raises(*_: Any) -> Any:
    raise ZeroDivisionError("broken")


@pytest.mark.parametrize("function", [off_by_one, wrong_gradient, raises])
def test_a_broken_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, list[Case]], function: Callable[..., Any]
) -> None:
    inject(monkeypatch, mask_scatter, function)
    (verdict,) = verify_case(found["mask_scatter"][0], ["native"])
    assert verdict.status == WRONG
    assert verdict.detail
    assert verdict.error_ratio is None or verdict.error_ratio > 1


def test_one_wrong_integer_is_wrong(monkeypatch: pytest.MonkeyPatch, found: dict[str, list[Case]]) -> None:
    def swapped(*arguments: Any, **options: Any) -> Any:
        visible, masked = select_reference.select_tokens(*arguments, **options)
        masked = masked.clone()
        masked[0], masked[1] = int(masked[1]), int(masked[0])
        return visible, masked

    inject(monkeypatch, select_tokens, swapped)
    (verdict,) = verify_case(found["select_tokens"][0], ["native"])
    assert verdict.status == WRONG
    assert "output 1: differs" in verdict.detail


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, found: dict[str, list[Case]]) -> None:
    inject(monkeypatch, mask_scatter, off_by_one, reason="not on Sundays")
    (verdict,) = verify_case(found["mask_scatter"][0], ["native"])
    assert (verdict.status, verdict.detail) == (UNAVAILABLE, "not on Sundays")


@pytest.mark.parametrize("broken", [False, True])
def test_doctor_verify_exits_with_1_if_a_kernel_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], broken: bool
) -> None:
    monkeypatch.setattr(doctor, "SIZES", ("tiny",))
    monkeypatch.setattr(op_cases, "REPRESENTATIVES", {"mae_ast_patch": op_cases.ALL})
    monkeypatch.setattr(verifying, "FRAMES", {"cpu": 20, "cuda": 20})
    monkeypatch.setattr(verifying, "CLIPS", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(verifying, "DTYPES", {"cpu": (torch.float32,), "cuda": (torch.float32,)})
    monkeypatch.setattr(measure, "COPY", {"cpu": 1 << 24, "cuda": 1 << 24})
    monkeypatch.setattr(measure, "FLUSH", {"cpu": 1 << 12, "cuda": 1 << 12})
    monkeypatch.setattr(measure, "MATRIX", {"cpu": 256, "cuda": 256})
    if broken:
        inject(monkeypatch, mask_scatter, off_by_one)
    report = tmp_path / "report.json"
    assert _main(["doctor", "--verify", "--json", str(report)]) == int(broken)
    found = json.loads(report.read_text())["verify"]
    wrong = {(row["op"], row["implementation"]) for row in found["rows"] if row["status"] == WRONG}
    assert wrong == ({("mask_scatter", "native")} if broken else set())
    assert ("WRONG: mask_scatter" in capsys.readouterr().out) == broken
    ok = [row for row in found["rows"] if row["status"] == OK]
    assert all(row["ms"] > 0 and row["share"] > 0 and row["moved"] > 0 for row in ok)


def test_bench_rows_have_what_a_benchmark_needs(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, list[Case]]
) -> None:
    monkeypatch.setattr(measure, "COPY", {"cpu": 1 << 24})
    watch = Stopwatch(CPU)
    case = found["masked_patch_loss"][0]
    rows = list(bench_case(case, watch, Ceilings(watch, 0.0), seconds=0.0, compiled=False))
    measured = {(row["provider"], row["mode"]): row for row in rows if row["status"] == OK}
    assert {("eager reference", "forward"), ("eager reference", "backward")} <= set(measured)
    for row in measured.values():
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["n"] >= measure.LEAST_ROUNDS
        assert row["roofline_share"] > 0
        assert row["sizes"] == case.sizes
    assert {"device", "date", "commit", "torch", "triton", "masktrain"} <= set(provenance(CPU))


def test_least_bytes_are_those_of_the_tensors(found: dict[str, list[Case]]) -> None:
    """Every output is written once, and what each case declares covers at least that."""
    for of_op in found.values():
        for case in of_op:
            written = sum(out.numel() * out.element_size() for out in case.call(*case.inputs) if out.dim())
            assert case.forward.moved >= written, case.op


def test_quantiles_and_roofline() -> None:
    quantiles = timing([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (quantiles.p20, quantiles.median, quantiles.p80, quantiles.n) == (2.0, 3.0, 5.0, 6)

    class Ten:
        copy = 10.0

        @staticmethod
        def matrix(dtype: torch.dtype) -> float:
            return 100.0

    ten: Any = Ten()
    assert share(4.0, moved=20, done=0, ceilings=ten, dtype=torch.float32) == 0.5
    assert share(4.0, moved=20, done=300, ceilings=ten, dtype=torch.float32) == 0.75


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed"], "no action 'speed'"),
        (["kernels", "--seconds", "-1"], "--seconds: must be at least 0"),
        (["kernels", "--recipe", "mae_ast"], "no recipe 'mae_ast'"),
        (["attention", "--device", "tpu"], "is no device"),
    ],
)
def test_bench_refuses(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err
