# SPDX-License-Identifier: Apache-2.0
"""Operations against torch's counter; bytes against saved-tensor hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from masktrain.masking.plan import plan_from_ids, visible_count
from masktrain.models.flops import activation_bytes, block_flops, forward_flops, train_flops
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae_ast import SIZES, MaeAst, MaeAstConfig
from masktrain.objectives import joint
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, cumulative

GRID = TokenGrid(freq=2, patch_freq=8, patch_time=4, order="time")
MODEL = MaeAstConfig(
    encoder_layers=3,
    embed_dim=32,
    ffn_dim=96,
    heads=4,
    decoder_layers=2,
    decoder_embed_dim=24,
    decoder_ffn_dim=80,
    decoder_heads=2,
    dropout=0.0,
    attention_dropout=0.0,
    dropout_input=0.0,
    encoder_layerdrop=0.4,
)


def batch(grid: TokenGrid, lengths: tuple[int, ...], ratio: float = 0.75) -> tuple[Spectrogram, MaskPlan]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(sum(lengths), grid.freq * grid.patch_freq, generator=generator)
    cu = cumulative(lengths, torch.int64, "cpu")
    spectrogram = Spectrogram(frames, lengths, cu, torch.arange(len(lengths)))
    layout = grid.layout(spectrogram)
    ids = [torch.randperm(n, generator=generator)[: visible_count(n, ratio)].tolist() for n in layout.lengths]
    return spectrogram, plan_from_ids(layout, ids)


@pytest.mark.parametrize("lengths", [(40, 40), (40, 22, 25)])
@pytest.mark.parametrize("bridge", [True, False])
def test_against_the_counter(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], bridge: bool) -> None:
    """Exactly what torch counts, with layers dropped, attention by its explicit definition."""
    monkeypatch.setenv("MASKTRAIN_KERNELS", "reference")
    same = {"decoder_embed_dim": 32, "decoder_heads": 4}
    model = MaeAst(MODEL if bridge else replace(MODEL, **same), GRID, InputNormConfig(kind="batch"))
    spectrogram, plan = batch(GRID, lengths)
    key = next(k for s in range(99) if model.active_layers(k := StepKey.make(0, s, "cpu")) == (2, 2))
    mean, scale = model.input_norm.affine(None)
    with FlopCounterMode(display=False) as forward:
        output = model(spectrogram, plan, mean, scale, key)
    layers = model.active_layers(key)
    got = forward_flops(model.config, GRID.patch_values, plan.n_visible, plan.layout.lengths, layers)
    assert got == forward.get_total_flops()
    slopes = [torch.ones_like(x) for x in output[2:]]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(list(output[2:]), slopes)
    assert train_flops(model, plan, layers) == forward.get_total_flops() + backward.get_total_flops()
    assert train_flops(model, plan) > train_flops(model, plan, layers)


def test_block() -> None:
    """n (24 d^2 + 4 n d) where the feed-forward part is 4 d wide; attention adds up clip by clip."""
    assert block_flops((128,), 768, 3072) == 128 * (24 * 768**2 + 4 * 128 * 768)
    assert block_flops((5, 9), 8, 32) == block_flops((5,), 8, 32) + block_flops((9,), 8, 32)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_bytes_kept_for_backward(monkeypatch: pytest.MonkeyPatch, p: float, size: str) -> None:
    """Within 5 % of what autograd really keeps, parameters and the spectrogram aside."""
    monkeypatch.delenv("MASKTRAIN_KERNELS", raising=False)
    grid = TokenGrid(freq=1, patch_freq=128, patch_time=2, order="time")
    rates = {"dropout": p, "attention_dropout": p, "dropout_input": p, "encoder_layerdrop": 0.0}
    model = MaeAst(MaeAstConfig(**SIZES[size], **rates), grid, InputNormConfig(kind="batch"))
    spectrogram, plan = batch(grid, (200, 200))
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    own.add(spectrogram.frames.untyped_storage().data_ptr())
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    mean, scale = model.input_norm.affine(None)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(spectrogram, plan, mean, scale, StepKey.make(0, 0, "cpu"))
        terms = joint.terms(output, spectrogram, plan, mean, scale, joint.JointConfig())
        joint.total(terms, joint.counts(plan, grid))
    assert activation_bytes(model, 100, 2) == pytest.approx(sum(kept.values()), rel=0.05)
