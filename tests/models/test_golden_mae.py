# SPDX-License-Identifier: Apache-2.0
"""Masked autoencoders against what the original code of MaskSpec, MSM-MAE, the MAE of the M2D repository and AudioMAE
with its global decoder computed: every case in the golden data, tensors, losses, gradients, init."""

from __future__ import annotations

import golden
import pytest
import torch
from golden import Golden, close

from masktrain.masking.plan import visible_count
from masktrain.models.mae import Mae
from masktrain.objectives.patches import masked_patches, standardised
from masktrain.types import Spectrogram, cumulative

PEERS = ("maskspec", "msm_mae", "m2d", "audiomae")
# What a case stores beside tensors: inputs, noise and masks, which other tests read.
OTHERS = {"input", "noise", "noise_t", "noise_f", "ids_keep", "ids_masked", "ids_restore", "mask", "loss"}


@pytest.fixture(params=golden.parameters(*PEERS))
def case(request: pytest.FixtureRequest) -> Golden:
    return golden.run(request.param)


@pytest.mark.parametrize("peer", PEERS)
def test_every_project_has_a_case(peer: str) -> None:
    if not golden.ROOT.is_dir():
        pytest.skip(f"no golden data at {golden.ROOT}; set MASKTRAIN_GOLDEN_DIR")
    assert None not in [one.values[0] for one in golden.parameters(peer)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["patch_tokens", "encoder_out", "decoder_normed", "pred"])
def test_tensors(case: Golden, name: str) -> None:
    close(*case.tensors[name])


def test_masked_tokens_and_all_tokens(case: Golden) -> None:
    """What a training step predicts of the masked tokens is what the full decoder predicts of them."""
    model, plan = case.case.model, case.case.plan
    assert isinstance(model, Mae) and case.prediction.pred_recon is not None
    masked = case.case.arrays["mask"].bool()
    close(case.prediction.pred_recon, case.case.arrays["pred"][masked])
    with torch.no_grad():
        rows = model.decode(case.prediction.encoder_out, plan, None, None)
        everything = model.reconstruction_head(rows).unflatten(0, (len(masked), -1))
    close(everything[:, -masked.shape[1] :], case.case.arrays["pred"])


def test_targets(case: Golden) -> None:
    """Where targets are stored: of all tokens, and of the masked ones as the loss reads them."""
    one = case.case
    if "target" not in one.arrays:
        assert "target" not in case.tensors
        return
    close(*case.tensors["target"])
    patches = masked_patches(one.spectrogram.frames, one.plan, one.mean, one.scale)
    ours = standardised(patches) if one.record["constructor"].get("norm_pix_loss") else patches
    close(ours, one.arrays["target"][one.arrays["mask"].bool()])


def test_masks(case: Golden) -> None:
    """The stored mask is the plan's, with as many visible tokens as we would leave."""
    plan, arrays, record = case.case.plan, case.case.arrays, case.case.record
    mask = torch.zeros(sum(plan.layout.lengths))
    mask[plan.masked.long()] = 1
    assert torch.equal(mask.view_as(arrays["mask"]), arrays["mask"])
    assert arrays["mask"].shape[1] == plan.layout.lengths[0]
    if "noise" in arrays:
        kept = visible_count(plan.layout.lengths[0], record["mask_ratio"])
        drawn = arrays["noise"].argsort(dim=1)
        assert torch.equal(drawn[:, :kept], arrays["ids_keep"])


def test_positions(case: Golden) -> None:
    """Those computed are those stored with the weights; the class token has none."""
    model, state = case.case.model, case.case.state
    assert isinstance(model, Mae)
    frames = case.case.spectrogram.clip(0)
    lengths = (len(frames),)
    one = Spectrogram(
        frames, lengths, cumulative(lengths, torch.int64, "cpu"), torch.zeros(1, dtype=torch.int64)
    )
    layout = case.case.grid.layout(one)
    for name, positions in (
        ("pos_embed", model.encoder_positions),
        ("decoder_pos_embed", model.decoder_positions),
    ):
        stored = state[name][0]
        extra = len(stored) - layout.lengths[0]
        assert extra == (model.cls_token is not None) and not stored[:extra].any()
        close(positions.of(layout, None, torch.float32), stored[extra:], 1e-6)


def test_losses(case: Golden) -> None:
    golden.check_loss(float(case.loss), case.case.record["loss"])
    golden.check_loss(float(case.loss), case.case.record["loss_float64"])


def test_gradient_norms(case: Golden) -> None:
    golden.check_gradient_norms(case)


def test_gradient_sums(case: Golden) -> None:
    golden.check_gradient_sums(case)


def test_weights_round_trip(case: Golden) -> None:
    golden.check_round_trip(case)


def test_nothing_stored_is_left_out(case: Golden) -> None:
    assert case.case.arrays.keys() - case.tensors.keys() <= OTHERS


def test_initial_weights(case: Golden) -> None:
    golden.check_initial_weights(case)
