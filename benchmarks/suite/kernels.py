# SPDX-License-Identifier: Apache-2.0
"""Is every kernel right, and how fast is it? At the sizes of the recipes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import torch

from masktrain.recipes import find
from masktrain.training.bench import GROUPS, bench, ceiling_rows
from masktrain.training.measure import Ceilings, Stopwatch
from masktrain.training.op_cases import (
    REPRESENTATIVES,
    Case,
    Problem,
    cases,
    implementations,
    representative_ops,
)
from masktrain.training.verify import CLIPS, UNAVAILABLE, WRONG, verify_case
from suite.harness import CannotRun, Check, Row

# dtypes in the order of their weight in training; what draws and the front end know one each
HALVES = (torch.bfloat16, torch.float32, torch.float16)
EXACT = ("philox_words", "select_tokens", "block_marks")
FLOAT32 = ("attention_keep_padded", "resample", "log_mel", "patch_mad")
# In the interpreter every value takes microseconds.
REHEARSAL = {"clips": 2, "frames": 36}


class Kernels:
    """The checks of kernels on one device. rehearsal: small, Triton interpreted."""

    def __init__(self, device: torch.device, *, rehearsal: bool) -> None:
        self.device, self.rehearsal = device, rehearsal
        self.sizes = ("tiny",) if rehearsal else ("base", "tiny")

    @cache  # noqa: B019
    def clock(self) -> tuple[Stopwatch, Ceilings]:
        """The stopwatch, and what it measured of copies and products."""
        watch = Stopwatch(self.device)
        return watch, Ceilings(watch)

    def verify(self) -> Iterator[Check]:
        """Every Triton kernel, torch's attention, the CUDA library, the integers of the references on this device."""
        for size in self.sizes:
            for dtype in HALVES:
                for recipe in REPRESENTATIVES:
                    for op in representative_ops(find(recipe, size)):
                        own = torch.int64 if op in EXACT else torch.float32 if op in FLOAT32 else dtype
                        if dtype != (torch.float32 if own == torch.int64 else own):
                            continue
                        for name in self._named(op):
                            label = str(own).removeprefix("torch.")
                            yield Check(
                                f"verify {op} {name} {label} {recipe} {size}",
                                f"Is {op} by {name} right in {label}, with gradients, at the sizes of {recipe} {size}?",
                                partial(self._verify, recipe, size, dtype, op, name),
                            )

    @staticmethod
    def _named(op: str) -> list[str]:
        names = {i.name for i in implementations(op)}
        wanted = (
            ["triton"]
            + ["native"] * (op in ("varlen_attention", "select_tokens"))
            + ["reference"] * (op in EXACT)
        )
        return [name for name in wanted if name in names]

    def _cases(self, recipe: str, size: str, dtype: torch.dtype) -> list[Case]:
        return _cached_cases(self.device, recipe, size, dtype, self.rehearsal)

    def _verify(self, recipe: str, size: str, dtype: torch.dtype, op: str, name: str) -> Row:
        found = [v for c in self._cases(recipe, size, dtype) if c.op == op for v in verify_case(c, [name])]
        assert found, f"no case of {op}"
        if all(v.status == UNAVAILABLE for v in found):
            raise CannotRun(found[0].detail)
        wrong = [f"{v.case}: {v.detail}" for v in found if v.status == WRONG]
        ratios = {v.case: v.error_ratio for v in found}
        if wrong:
            return {"status": "wrong", "detail": "; ".join(wrong), "error_ratios": ratios}
        return {"op": op, "provider": name, "error_ratios": ratios}

    def calibration(self) -> Check:
        """The ceilings."""
        dtypes = (torch.float32, torch.bfloat16) if self.rehearsal else HALVES
        return Check(
            "calibration",
            "How many bytes does a copy move here per second, and how many operations does a matrix product do?",
            lambda: ceiling_rows(self.clock()[1], dtypes),
        )

    def bench(self) -> Iterator[Check]:
        """Times of all providers of an op."""
        for group in ("attention", "kernels"):
            for op in GROUPS[group]:
                yield Check(
                    f"bench {op}", f"How fast is each implementation of {op}, and what share of the roofline?",
                    partial(self._bench, op),
                )  # fmt: skip

    def _bench(self, op: str) -> list[Row]:
        found = [find(name, self.sizes[0]) for name in REPRESENTATIVES]
        recipes = [(recipe, (op,)) for recipe in found if op in representative_ops(recipe)]
        if self.rehearsal:
            recipes = recipes[:1]  # the others' results are verified above
        # on the GPU 4000 and 64000 tokens
        rows: list[Row] = []
        for clips in (REHEARSAL["clips"],) if self.rehearsal else (128, 8):
            frames = 16 if self.rehearsal else None
            rows += bench(
                recipes, *self.clock(), clips=clips, frames=frames,
                seconds=0.0 if self.rehearsal else 0.1, compiled=not self.rehearsal,
            )  # fmt: skip
        broken = [f"{r['case']} {r['provider']}: {r['detail']}" for r in rows if r["status"] == WRONG]
        assert not broken, "; ".join(broken)
        # a provider that cannot run is a row of its own, and not an error of the check
        return [{**row, "provider_status": row["status"], "status": "ok"} for row in rows]


_kept: dict[tuple[object, ...], list[Case]] = {}


def _cached_cases(
    device: torch.device, recipe: str, size: str, dtype: torch.dtype, rehearsal: bool
) -> list[Case]:
    """Only the last ones are kept: the cases of a recipe take up to some gigabytes."""
    key = (recipe, size, dtype)
    if key not in _kept:
        _kept.clear()
        clips, frames = (REHEARSAL["clips"], REHEARSAL["frames"]) if rehearsal else (CLIPS["cuda"], None)
        _kept[key] = list(cases(Problem(find(recipe, size), device, clips, frames), [dtype]))
    return _kept[key]
