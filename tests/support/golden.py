# SPDX-License-Identifier: Apache-2.0
"""Recorded cases of the original code in tests: where they are, and what has to agree how closely."""

from __future__ import annotations

import math
import os
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
ROOT = Path(os.environ.get("MASKTRAIN_GOLDEN_DIR", REPO.parent / "shared" / "golden"))
# the GPU suite, which also runs without tests/, compares the same cases
if str(REPO / "benchmarks") not in sys.path:
    sys.path.append(str(REPO / "benchmarks"))
from suite.golden_cases import (  # noqa: E402
    GRADIENT,
    TENSOR,
    Case,
    largest_error,
    load,
    served,
    wrong_loss,
    wrong_norms,
)


class Golden:
    """A case with one forward and backward pass of our model."""

    def __init__(self, peer: str, name: str) -> None:
        torch.manual_seed(0)
        self.case: Case = load(ROOT, peer, name, torch.device("cpu"))
        self.prediction, self.terms, self.loss = self.case.run()
        self.tensors = self.case.tensors(self.prediction)


def parameters(*peers: str) -> list[object]:
    """Return a pytest parameter for each case of these projects; one that skips where there is no data."""
    found = [(peer, name) for peer, name in served(ROOT) if peer in peers]
    return [pytest.param(one, id="/".join(one)) for one in found] or [pytest.param(None, id="no golden data")]


@cache
def _run(peer: str, name: str) -> Golden:
    return Golden(peer, name)


def run(which: tuple[str, str] | None) -> Golden:
    """Return a case of `parameters`, computed once."""
    if which is None:
        pytest.skip(f"no golden data at {ROOT}; set MASKTRAIN_GOLDEN_DIR")
    return _run(*which)


def close(ours: Tensor, recorded: Tensor, tolerance: float = TENSOR) -> None:
    assert ours.shape == recorded.shape
    assert largest_error(ours, recorded) <= tolerance


def check_tensors(golden: Golden) -> None:
    errors = {name: largest_error(*both) for name, both in golden.tensors.items()}
    assert not {name: error for name, error in errors.items() if not error <= TENSOR}


def check_loss(ours: float, recorded: float) -> None:
    assert not wrong_loss(ours, recorded), (ours, recorded)


def check_gradient_norms(golden: Golden) -> None:
    """Exactly the recorded parameters have a gradient, and of the recorded norm."""
    gradients, recorded = golden.case.gradients(), golden.case.recorded_norms()
    assert gradients.keys() == recorded.keys()
    assert not wrong_norms(gradients, recorded)


def check_gradient_sums(golden: Golden) -> None:
    """A sum is small against its norm: compared on the scale of norm * sqrt(size), which bounds it."""
    record = golden.case.record
    for name, grad in golden.case.gradients().items():
        scale = record["grad_norms"][name] * math.sqrt(grad.numel())
        assert abs(float(grad.sum()) - record["grad_sums"][name]) <= GRADIENT * scale + 1e-6, name


def check_round_trip(golden: Golden) -> None:
    """Every name of the reference is ours or on the list; export gives back the same bits."""
    case = golden.case
    imported = case.import_state(case.state, case.model.state_dict())
    assert imported.keys() == case.model.state_dict().keys()
    exported = case.export_state(imported)
    assert exported.keys() == case.state.keys() - set(case.ignored)
    assert all(torch.equal(value, case.state[name]) for name, value in exported.items())


def check_initial_weights(golden: Golden) -> None:
    """Constants are exact; means, deviations and ranges of random parameters agree within sampling error."""
    case = golden.case
    torch.manual_seed(1)
    fresh = case.export_state(dict(case.fresh().named_parameters()))
    wanted = case.record["init_stats_before_perturbation"]
    assert fresh.keys() == wanted.keys() - set(case.ignored)
    for name, ours in fresh.items():
        ours, theirs = ours.detach(), wanted[name]
        assert list(ours.shape) == theirs["shape"], name
        if theirs["std"] == 0:
            assert float(ours.min()) == float(ours.max()) == theirs["mean"], name
            continue
        n, std = ours.numel(), theirs["std"]
        # Both sides are samples: 5 standard errors of their difference.
        assert abs(float(ours.mean()) - theirs["mean"]) <= 5 * std * math.sqrt(2 / n), name
        assert abs(float(ours.std()) / std - 1) <= 5 * math.sqrt(2 / (2 * n)), name
        reach = max(abs(theirs["min"]), abs(theirs["max"]))
        assert 0.6 < float(ours.abs().max()) / reach < 1.6, name
        assert (float(ours.min()) < 0) == (theirs["min"] < 0), name
