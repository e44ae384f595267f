# SPDX-License-Identifier: Apache-2.0
"""SSAST against what the original code computed: every case in the golden data, tensors, losses, gradients, init."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from golden import (
    GRADIENT,
    ROOT,
    Case,
    Golden,
    check_gradient_norms,
    check_initial_weights,
    check_loss,
    check_round_trip,
    check_tensors,
)
from torch import Tensor

from masktrain.masking.plan import plan_from_ids
from masktrain.models.adapters.ssast import IGNORED, export_state, import_state
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.pretrainer import Prediction
from masktrain.models.ssast import Ssast, SsastConfig
from masktrain.objectives.joint import JointConfig
from masktrain.objectives.patches import masked_patches
from masktrain.objectives.registry import total
from masktrain.types import LossTerm, MaskPlan, Spectrogram, TokenGrid, TokenLayout, cumulative

CASES = sorted(p.stem for p in (ROOT / "ssast").glob("*.json"))
MASKS = ("mask_ids_mpc", "mask_ids_mpg")


@dataclass
class SsastCase(Case):
    """A case with a mask for each pass, `plan` and `second`; both passes are one call."""

    second: MaskPlan

    @property
    def plans(self) -> tuple[MaskPlan, MaskPlan]:
        return self.plan, self.second

    def run(self) -> tuple[Prediction, dict[str, LossTerm], Tensor]:
        prediction = self.model(self.spectrogram, self.plans, self.mean, self.scale, None)
        terms = self.objective.terms(prediction, self.spectrogram, self.plans, self.mean, self.scale)
        loss = total(terms, self.objective.counts(self.plans, self.grid))
        loss.backward()
        return prediction, terms, loss.detach()

    @torch.no_grad()
    def tensors(self, prediction: Prediction) -> dict[str, tuple[Tensor, Tensor]]:
        """Every recorded tensor; predictions in the order in which the masked tokens were drawn."""
        model, clips = self.model, len(self.spectrogram.lengths)
        assert isinstance(model, Ssast)
        assert prediction.pred_class is not None and prediction.pred_recon is not None
        everything = model.encode(self.spectrogram, self.plans, self.mean, self.scale)
        first, second = everything.unflatten(0, (2, clips, -1))
        ours = {
            "patch_tokens": model.patch_embed(self.all_patches()).unflatten(0, (clips, -1)),
            "encoder_out_mpc": first,
            "encoder_out_mpg": second,
            "pred_mpc": self.as_drawn(prediction.pred_class, MASKS[0]),
            "pred_mpg": self.as_drawn(prediction.pred_recon, MASKS[1]),
        }
        return {name: (value, self.arrays[name]) for name, value in ours.items()}

    def as_drawn(self, rows: Tensor, ids: str) -> Tensor:
        """Return our rows (B N, P), ascending, as (B, N, P) in the order of the recorded ids."""
        place = self.arrays[ids].argsort().argsort()
        return torch.take_along_dim(rows.unflatten(0, (len(place), -1)), place[:, :, None], 1)


def load(name: str) -> SsastCase:
    path = ROOT / "ssast" / name
    record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    arrays = {k: torch.from_numpy(v) for k, v in np.load(f"{path}.npz").items()}
    state = {k: torch.from_numpy(v) for k, v in np.load(f"{path}.state.npz").items()}
    made = record["constructor"]
    assert (made["fstride"], made["tstride"]) == (made["fshape"], made["tshape"])
    clips, frames, mels = arrays["input"].shape
    grid = TokenGrid(
        freq=mels // made["fshape"],
        patch_freq=made["fshape"],
        patch_time=made["tshape"],
        order="freq",
        partial="drop",
    )
    config = SsastConfig(
        encoder_layers=made["depth"],
        embed_dim=made["embed_dim"],
        ffn_dim=4 * made["embed_dim"],
        heads=made["num_heads"],
        columns=made["input_tdim"] // made["tshape"],
    )
    # the input is normalised before it is recorded
    norm = InputNormConfig(kind="global", factor=1.0, dataset_mean=0.0, dataset_std=1.0)
    fresh = partial(Ssast, config, grid, norm)
    model = fresh()
    model.load_state_dict(import_state(state, model.state_dict(), grid))
    lengths = (frames,) * clips
    cu = cumulative(lengths, torch.int64, "cpu")
    spectrogram = Spectrogram(arrays["input"].flatten(0, 1), lengths, cu, torch.arange(clips))
    mean, scale = model.input_norm.affine(None)
    first, second = (plan_of(grid.layout(spectrogram), arrays[ids]) for ids in MASKS)
    return SsastCase(
        peer="ssast",
        name=name,
        record=record,
        arrays=arrays,
        state=state,
        grid=grid,
        fresh=fresh,
        model=model,
        spectrogram=spectrogram,
        plan=first,
        second=second,
        mean=mean,
        scale=scale,
        objective=JointConfig(info_nce_axis="predictions"),
        export_state=lambda values: export_state(values, grid),
        import_state=lambda values, wanted: import_state(values, wanted, grid),
        ignored=IGNORED,
    )


def plan_of(layout: TokenLayout, masked: Tensor) -> MaskPlan:
    everything = set(range(layout.lengths[0]))
    return plan_from_ids(layout, [sorted(everything - set(ids)) for ids in masked.tolist()])


class SsastGolden(Golden):
    """A case with one forward and backward pass of our model."""

    case: SsastCase

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.case = load(name)
        self.prediction, self.terms, self.loss = self.case.run()
        self.tensors = self.case.tensors(self.prediction)


@cache
def run(name: str) -> SsastGolden:
    return SsastGolden(name)


@pytest.fixture(params=CASES or [None])
def golden(request: pytest.FixtureRequest) -> SsastGolden:
    if request.param is None:
        pytest.skip(f"no golden data at {ROOT / 'ssast'}; set MASKTRAIN_GOLDEN_DIR")
    return run(request.param)


def test_tensors(golden: SsastGolden) -> None:
    scalars = {"nce", "acc", "mse", "loss"}
    assert golden.tensors.keys() == golden.case.arrays.keys() - scalars - {"input", *MASKS}
    check_tensors(golden)


def test_losses(golden: SsastGolden) -> None:
    check_loss(float(golden.loss), golden.case.record["loss"])
    for ours, theirs in (("mse", "mse"), ("info_nce", "nce")):
        term = golden.terms[ours]
        check_loss(float(term.sum.detach()) / term.count, float(golden.case.arrays[theirs]))


def test_accuracy(golden: SsastGolden) -> None:
    """The reference takes the softmax over predictions, and then for each prediction the patch of the largest."""
    case = golden.case
    patches = masked_patches(case.spectrogram.frames, case.plan, case.mean, case.scale)
    n = case.plan.n_masked[0]
    assert golden.prediction.pred_class is not None
    logits = patches.unflatten(0, (-1, n)) @ golden.prediction.pred_class.detach().unflatten(0, (-1, n)).mT
    right = logits.softmax(2).argmax(1) == torch.arange(n)
    assert float(right.float().mean()) == pytest.approx(float(case.arrays["acc"]), abs=1e-6)


def test_gradient_norms(golden: SsastGolden) -> None:
    check_gradient_norms(golden)


def test_gradient_sums(golden: SsastGolden) -> None:
    """A sum may be small against its norm: compared on the scale of norm * sqrt(size), which bounds it. The gradient
    of the matching head's last bias is 0 but for rounding, since the softmax over predictions does not see it."""
    record = golden.case.record
    for name, grad in golden.case.gradients().items():
        tolerance = math.sqrt(grad.numel()) * (GRADIENT * record["grad_norms"][name] + 1e-6)
        assert abs(float(grad.sum()) - record["grad_sums"][name]) <= tolerance, name


def test_weights_round_trip(golden: SsastGolden) -> None:
    check_round_trip(golden)


def test_names_of_published_checkpoints(golden: SsastGolden) -> None:
    """They were saved out of DataParallel, and hold the backbone's class heads."""
    case = golden.case
    state = {f"module.{name}": value for name, value in case.state.items()}
    state["module.v.head.weight"] = torch.zeros(1000, 4)
    imported = case.import_state(state, case.model.state_dict())
    plain = case.import_state(case.state, case.model.state_dict())
    assert imported.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in imported.items())


def test_initial_weights(golden: SsastGolden) -> None:
    check_initial_weights(golden)
