# SPDX-License-Identifier: Apache-2.0
"""Operations against torch's counter; bytes against saved-tensor hooks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from masktrain.masking.plan import plan_from_ids, visible_count
from masktrain.models.flops import block_flops, stack_flops
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae import Mae, MaeConfig
from masktrain.models.mae_ast import SIZES, MaeAst, MaeAstConfig, forward_flops
from masktrain.models.pretrainer import Pretrainer
from masktrain.objectives.joint import JointConfig
from masktrain.objectives.reconstruction import ReconstructionConfig
from masktrain.objectives.registry import Objective, total
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, cumulative

GRID = TokenGrid(freq=2, patch_freq=8, patch_time=4, order="time")
NORM = InputNormConfig(kind="batch")
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
MAE = MaeConfig(
    encoder_layers=3,
    embed_dim=32,
    ffn_dim=96,
    heads=4,
    decoder_layers=2,
    decoder_embed_dim=24,
    decoder_ffn_dim=80,
    decoder_heads=2,
)


def batch(grid: TokenGrid, lengths: tuple[int, ...], ratio: float = 0.75) -> tuple[Spectrogram, MaskPlan]:
    generator = torch.Generator().manual_seed(0)
    frames = torch.randn(sum(lengths), grid.freq * grid.patch_freq, generator=generator)
    cu = cumulative(lengths, torch.int64, "cpu")
    spectrogram = Spectrogram(frames, lengths, cu, torch.arange(len(lengths)))
    layout = grid.layout(spectrogram)
    ids = [torch.randperm(n, generator=generator)[: visible_count(n, ratio)].tolist() for n in layout.lengths]
    return spectrogram, plan_from_ids(layout, ids)


def counted(
    model: Pretrainer, spectrogram: Spectrogram, plan: MaskPlan, key: StepKey | None
) -> tuple[int, int]:
    """Operations of forward and of backward, as torch counts them."""
    mean, scale = model.input_norm.affine(None)
    with FlopCounterMode(display=False) as forward:
        output = model(spectrogram, (plan,), mean, scale, key)
    predicted = [x for x in output[1:] if x is not None]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(predicted, [torch.ones_like(x) for x in predicted])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("lengths", [(40, 40), (40, 22, 25)])
@pytest.mark.parametrize("bridge", [True, False])
def test_against_the_counter(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], bridge: bool) -> None:
    """Exactly what torch counts, with layers dropped, attention by its explicit definition."""
    monkeypatch.setenv("MASKTRAIN_KERNELS", "reference")
    same = {"decoder_embed_dim": 32, "decoder_heads": 4}
    model = MaeAst(MODEL if bridge else replace(MODEL, **same), GRID, NORM)
    spectrogram, plan = batch(GRID, lengths)
    key = next(k for s in range(99) if model.active_layers(k := StepKey.make(0, s, "cpu")) == (2, 2))
    forward, backward = counted(model, spectrogram, plan, key)
    layers = model.active_layers(key)
    got = forward_flops(model.config, GRID.patch_values, plan.n_visible, plan.layout.lengths, layers)
    assert got == forward
    assert model.train_flops((plan,), key) == forward + backward
    assert model.train_flops((plan,)) > model.train_flops((plan,), key)


@pytest.mark.parametrize("lengths", [(40, 40), (40, 22, 25)])
@pytest.mark.parametrize(
    "config",
    [MAE, replace(MAE, cls_token=False), replace(MAE, key_bias=False, decoder_positions="sincos_1d")],
    ids=["class token", "no class token", "no key bias"],
)
def test_mae_against_the_counter(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], config: MaeConfig
) -> None:
    monkeypatch.setenv("MASKTRAIN_KERNELS", "reference")
    model = Mae(config, GRID, NORM)
    spectrogram, plan = batch(GRID, lengths)
    assert model.train_flops((plan,)) == sum(counted(model, spectrogram, plan, None))


def test_block() -> None:
    """n (24 d^2 + 4 n d) where the feed-forward part is 4 d wide; attention adds up clip by clip; behind it only
    kept rows count."""
    assert block_flops((128,), 768, 3072) == 128 * (24 * 768**2 + 4 * 128 * 768)
    assert block_flops((5, 9), 8, 32) == block_flops((5,), 8, 32) + block_flops((9,), 8, 32)
    assert block_flops((5, 9), 8, 32) - block_flops((5, 9), 8, 32, 3) == 11 * 2 * (8 * 8 + 2 * 8 * 32)
    assert stack_flops((5, 9), 8, 32, 3, 3) == 2 * block_flops((5, 9), 8, 32) + block_flops((5, 9), 8, 32, 3)
    assert stack_flops((5, 9), 8, 32, 0) == 0


def kept_for_backward(
    model: Pretrainer, objective: Objective, spectrogram: Spectrogram, plan: MaskPlan
) -> int:
    """Bytes that autograd keeps, parameters and the spectrogram aside."""
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
        output = model(spectrogram, (plan,), mean, scale, StepKey.make(0, 0, "cpu"))
        terms = objective.terms(output, spectrogram, (plan,), mean, scale)
        total(terms, objective.counts((plan,), plan.layout.grid))
    return sum(kept.values())


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_bytes_kept_for_backward(monkeypatch: pytest.MonkeyPatch, p: float, size: str) -> None:
    """Within 5 % of what autograd really keeps."""
    monkeypatch.delenv("MASKTRAIN_KERNELS", raising=False)
    grid = TokenGrid(freq=1, patch_freq=128, patch_time=2, order="time")
    rates = {"dropout": p, "attention_dropout": p, "dropout_input": p, "encoder_layerdrop": 0.0}
    model = MaeAst(MaeAstConfig(**SIZES[size], **rates), grid, NORM)
    kept = kept_for_backward(model, JointConfig(), *batch(grid, (200, 200)))
    assert model.activation_bytes(100, 2, 0.75) == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("ratio", [0.75, 0.5])
@pytest.mark.parametrize(
    "config",
    [
        MaeConfig(
            encoder_layers=6,
            embed_dim=128,
            ffn_dim=512,
            heads=4,
            decoder_layers=2,
            decoder_embed_dim=128,
            decoder_ffn_dim=512,
            decoder_heads=4,
        ),
        MaeConfig(
            encoder_layers=4,
            embed_dim=384,
            ffn_dim=1536,
            heads=6,
            decoder_layers=4,
            decoder_embed_dim=192,
            decoder_ffn_dim=768,
            decoder_heads=6,
            cls_token=False,
        ),
    ],
    ids=["tiny", "no class token"],
)
def test_bytes_that_mae_keeps(monkeypatch: pytest.MonkeyPatch, config: MaeConfig, ratio: float) -> None:
    """Within 5 % of what autograd really keeps."""
    monkeypatch.delenv("MASKTRAIN_KERNELS", raising=False)
    grid = TokenGrid(freq=8, patch_freq=16, patch_time=16, order="freq", partial="drop")
    model = Mae(config, grid, NORM)
    kept = kept_for_backward(model, ReconstructionConfig(), *batch(grid, (416, 416), ratio))
    assert model.activation_bytes(8 * 26, 2, ratio) == pytest.approx(kept, rel=0.05)
