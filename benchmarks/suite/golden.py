# SPDX-License-Identifier: Apache-2.0
"""Do the models compute what the original code of their projects computed, on this device too?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from masktrain.kernels._float32 import full_float32
from suite.golden_cases import TENSOR, largest_error, load, served, wrong_loss, wrong_norms
from suite.harness import CannotRun, Check, Row


def checks(device: torch.device, folder: Path) -> Iterator[Check]:
    """Yield a check for each stored case that our models have a form for."""
    question = (
        "Do the tensors, losses and gradient norms of case {} of the original {} code agree, in float32?"
    )
    found = list(served(folder))
    for peer, name in found:
        yield Check(
            f"golden {peer} {name}",
            question.format(name, peer),
            partial(_agree, device, folder, peer, name),
        )
    if not found:
        yield Check("golden", question.format("-", "-"), partial(_absent, folder))


def _absent(folder: Path) -> Row:
    raise CannotRun(f"no golden data at {folder}; MASKTRAIN_GOLDEN_DIR names its folder")


def _agree(device: torch.device, folder: Path, peer: str, name: str) -> Row:
    case = load(folder, peer, name, device)
    with full_float32(device.type):
        prediction, _, loss = case.run()
        errors = {n: largest_error(*both) for n, both in case.tensors(prediction).items()}
    wrong = [f"{n}: {e:.3g} > {TENSOR}" for n, e in errors.items() if not e <= TENSOR]
    errors["loss"] = abs(float(loss) - case.record["loss"])
    if wrong_loss(float(loss), case.record["loss"]):
        wrong.append(f"loss: {errors['loss']:.3g}")
    gradients, recorded = case.gradients(), case.recorded_norms()
    wrong += [
        f"gradient of {n}: {ours:.6g}, recorded {theirs:.6g}"
        for n, (ours, theirs) in wrong_norms(gradients, recorded).items()
    ]
    assert not wrong, "; ".join(wrong)
    errors["gradient"] = max(abs(float(gradients[n].norm()) - v) / (v + 1e-6) for n, v in recorded.items())
    return {"errors": errors}
