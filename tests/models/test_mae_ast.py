# SPDX-License-Identifier: Apache-2.0
"""MAE-AST as a whole: dropout, micro-batches, clips of any length, token orders, layerdrop, sizes."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from masktrain.config import from_dict, to_dict
from masktrain.errors import CheckpointError, ConfigError
from masktrain.masking.plan import plan_from_ids, visible_count
from masktrain.models import registry
from masktrain.models.adapters.mae_ast import config_from_state, export_state, import_state
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae_ast import SITE_DECODER, SITE_ENCODER, SITE_INPUT, SIZES, MaeAst, MaeAstConfig
from masktrain.models.positions import Positions, sincos_table
from masktrain.models.transformer import STACK_SITES
from masktrain.objectives.joint import JointConfig
from masktrain.objectives.registry import total
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, cumulative

NORM = InputNormConfig(kind="batch")
SMALL = MaeAstConfig(
    encoder_layers=3,
    embed_dim=16,
    ffn_dim=32,
    heads=2,
    decoder_layers=2,
    decoder_embed_dim=24,
    decoder_ffn_dim=40,
    decoder_heads=3,
    activation_dropout=0.2,
    encoder_layerdrop=0.3,
    decoder_layerdrop=0.1,
)
STILL = replace(
    SMALL,
    dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    dropout_input=0.0,
    encoder_layerdrop=0.0,
    decoder_layerdrop=0.0,
)
GRIDS = {
    "patch": TokenGrid(freq=2, patch_freq=4, patch_time=3, order="time"),
    "patch freq-major": TokenGrid(freq=2, patch_freq=4, patch_time=3, order="freq"),
    "frame": TokenGrid(freq=1, patch_freq=8, patch_time=2, order="time", partial="drop"),
}
LENGTHS = (30, 12, 41, 30, 7, 23)


def build(config: MaeAstConfig = SMALL, grid: TokenGrid = GRIDS["patch"]) -> MaeAst:
    """A float64 model with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = MaeAst(config, grid, NORM).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn_like(p), alpha=0.2 if p.dim() > 1 or "bias" in name else 0.1)
    return model.train()


def clip(number: int, frames: int) -> Tensor:
    return torch.randn(frames, 8, generator=torch.Generator().manual_seed(number), dtype=torch.float64) - 4


def batch(places: list[int], grid: TokenGrid) -> tuple[Spectrogram, MaskPlan]:
    """The clips of LENGTHS at `places`; a clip's frames, id and mask do not depend on where it stands."""
    lengths = tuple(LENGTHS[b] for b in places)
    spectrogram = Spectrogram(
        torch.cat([clip(b, LENGTHS[b]) for b in places]),
        lengths,
        cumulative(lengths, torch.int64, "cpu"),
        torch.tensor([1000 + b for b in places]),
    )
    layout = grid.layout(spectrogram)
    ids = []
    for b, n in zip(places, layout.lengths, strict=True):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(b)).tolist()
        ids.append(order[: visible_count(n, 0.6)])
    return spectrogram, plan_from_ids(layout, ids)


MEAN, SCALE = torch.full((1,), -4.0, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
COUNTS = {"mse": 1000, "info_nce": 40}


def step(model: MaeAst, places: list[int], key: StepKey | None) -> tuple[dict[str, Tensor], Tensor]:
    """Return the outputs of each clip and the loss; adds gradients."""
    spectrogram, plan = batch(places, model.grid)
    output = model(spectrogram, (plan,), MEAN, SCALE, key)
    loss = total(JointConfig().terms(output, spectrogram, (plan,), MEAN, SCALE), COUNTS)
    loss.backward()
    with torch.no_grad():
        decoder_out = model.decode(output.encoder_out, plan, key if model.training else None, None)
    clips = {}
    for name, value, sizes in (
        ("encoder_out", output.encoder_out, plan.n_visible),
        ("decoder_out", decoder_out, plan.layout.lengths),
        ("pred_recon", output.pred_recon, plan.n_masked),
        ("pred_class", output.pred_class, plan.n_masked),
    ):
        for b, rows in zip(places, value.detach().split(sizes), strict=True):
            clips[f"{name}/{b}"] = rows
    return clips, loss.detach()


def gradients(model: MaeAst) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("config", [SMALL, STILL, replace(SMALL, norm="pre")], ids=["drop", "still", "pre"])
def test_whole_batch_equals_its_parts(grid: TokenGrid, config: MaeAstConfig) -> None:
    """Micro-batches, ranks and the order of clips change nothing: outputs, loss, gradients to 1e-10."""
    model = build(config, grid)
    key = StepKey.make(7, 3, "cpu")
    outputs, loss = step(model, [0, 1, 2, 3, 4, 5], key)
    whole = gradients(model)
    for parts in ([[0, 1, 2], [3, 4, 5]], [[4, 2], [0, 5, 1], [3]], [[5, 3, 1, 0, 2, 4]]):
        model.zero_grad(set_to_none=True)
        again: dict[str, Tensor] = {}
        summed = torch.zeros((), dtype=torch.float64)
        for part in parts:
            rows, value = step(model, part, key)
            again |= rows
            summed += value
        assert again.keys() == outputs.keys()
        for name, rows in again.items():
            assert torch.allclose(rows, outputs[name], rtol=0, atol=1e-10), name
        assert abs(float(summed - loss)) < 1e-10 * float(loss)
        parts_gradients = gradients(model)
        assert parts_gradients.keys() == whole.keys()
        for name, grad in parts_gradients.items():
            size = float(whole[name].abs().max())
            assert torch.allclose(grad, whole[name], rtol=0, atol=1e-10 * (size + 1)), name


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_each_implementation_in_a_step(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    """Whatever computes it, a step with dropout is the same to 1e-10."""
    key = StepKey.make(7, 3, "cpu")
    monkeypatch.delenv("MASKTRAIN_KERNELS", raising=False)
    chosen = build()
    outputs, loss = step(chosen, [0, 1, 2, 3], key)
    monkeypatch.setenv("MASKTRAIN_KERNELS", implementation)
    forced = build()
    again, same = step(forced, [0, 1, 2, 3], key)
    assert abs(float(same - loss)) < 1e-10 * float(loss)
    for name, rows in again.items():
        assert torch.allclose(rows, outputs[name], rtol=0, atol=1e-10), name
    want = gradients(chosen)
    for name, grad in gradients(forced).items():
        assert torch.allclose(grad, want[name], rtol=0, atol=1e-10 * (float(want[name].abs().max()) + 1)), (
            name
        )


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradients_by_differences(norm: str) -> None:
    """With dropout on: the slope along a random direction of all weights is that of the loss itself."""
    model = build(replace(SMALL, norm=norm))
    key = StepKey.make(5, 9, "cpu")
    step(model, [1, 4, 5], key)
    generator = torch.Generator().manual_seed(3)
    grads = gradients(model)
    weights = {n: p for n, p in model.named_parameters() if n in grads}
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in weights.items()}
    slope = sum(float((grads[n] * direction[n]).sum()) for n in weights)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in weights.items():
                p.add_(direction[n], alpha=sign * 1e-6)
        values.append(float(step(model, [1, 4, 5], key)[1]))
        with torch.no_grad():
            for n, p in weights.items():
                p.sub_(direction[n], alpha=sign * 1e-6)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    "part", ["dropout", "attention_dropout", "activation_dropout", "dropout_input", "encoder_layerdrop"]
)
def test_each_dropout_acts_alone(part: str) -> None:
    """Each is off in evaluation and without a key, changes with the step and the seed, and repeats itself."""
    model = build(replace(STILL, **{part: 0.5}))
    still = build(STILL)
    plain, _ = step(still, [0, 1], None)

    def output(seed: int, number: int) -> Tensor:
        return step(model, [0, 1], StepKey.make(seed, number, "cpu"))[0]["pred_recon/0"]

    first = output(1, 1)
    assert torch.equal(first, output(1, 1))
    draws = [output(1, number) for number in range(2, 8)]
    assert any(not torch.equal(first, other) for other in draws)
    assert any(not torch.equal(first, output(seed, 1)) for seed in range(2, 8))
    assert any(not torch.equal(plain["pred_recon/0"], other) for other in draws)
    assert torch.equal(step(model, [0, 1], None)[0]["pred_recon/0"], plain["pred_recon/0"])
    model.eval()
    assert torch.equal(output(1, 1), plain["pred_recon/0"])


def test_sites_are_distinct() -> None:
    """No two places of the model share dropout bits."""
    config = MaeAstConfig(
        encoder_layers=511,
        embed_dim=2,
        ffn_dim=1,
        heads=1,
        decoder_layers=511,
        decoder_embed_dim=2,
        decoder_ffn_dim=1,
        decoder_heads=1,
    )
    model = MaeAst(config, GRIDS["frame"], NORM)
    sites = [SITE_INPUT]
    for base, stack in ((SITE_ENCODER, model.encoder), (SITE_DECODER, model.decoder)):
        sites += [base, *(block.site + i for block in stack.blocks for i in range(4))]
        assert all(base <= s < base + STACK_SITES for s in sites[-1 - 4 * 511 :])
    assert len(set(sites)) == len(sites) and max(sites) < 1 << 16


def test_dropout_rate_of_embeddings() -> None:
    """The share of dropped input values is p: a stack with only its input dropout."""
    model = build(replace(STILL, dropout=0.1, encoder_layers=1))
    seen: list[Tensor] = []
    model.encoder.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for number in range(20):
        step(model, [0, 1, 2, 3, 4, 5], StepKey.make(0, number, "cpu"))
    values = torch.cat([x.flatten() for x in seen])
    assert len(values) > 5000
    assert abs(float((values == 0).double().mean()) - 0.1) < 4 * math.sqrt(0.09 / len(values))
    assert len({tuple((x == 0).flatten().tolist()) for x in seen}) == 20


def test_layerdrop() -> None:
    """The rate is p, encoder and decoder differ, and a dropped layer gets no gradient and does not run."""
    model = build()
    drawn = [model.active_layers(StepKey.make(1, s, "cpu")) for s in range(2000)]
    for place, (layers, p) in enumerate(((3, 0.3), (2, 0.1))):
        share = sum(a[place] for a in drawn) / (2000 * layers)
        assert abs(share - (1 - p)) < 4 * math.sqrt(p * (1 - p) / (2000 * layers))
    assert drawn == [model.active_layers(StepKey.make(1, s, "cpu")) for s in range(2000)]
    assert model.active_layers(None) == (3, 2)
    same = build(replace(SMALL, encoder_layers=2, encoder_layerdrop=0.1))
    keys = [StepKey.make(1, s, "cpu") for s in range(2000)]
    assert any(same.encoder.active(k) != same.decoder.active(k) for k in keys)
    key = next(k for k in keys if len(model.encoder.active(k)) == 2)
    step(model, [0, 1], key)
    for layer, block in enumerate(model.encoder.blocks):
        ran = layer in model.encoder.active(key)
        assert all((p.grad is not None) == ran for p in block.parameters())
    assert SMALL.may_drop_layers and not STILL.may_drop_layers


def test_wanted_rows_are_those_of_all() -> None:
    """What the last block leaves out changes no row that is asked for, also with dropout and no layer at all."""
    key = StepKey.make(7, 3, "cpu")
    for norm in ("post", "pre"):
        model = build(replace(SMALL, norm=norm))
        spectrogram, plan = batch([0, 4, 2], model.grid)
        encoder_out = model(spectrogram, (plan,), MEAN, SCALE, key).encoder_out
        for drops in (key, None):
            everything = model.decode(encoder_out, plan, drops, None)
            for wanted in (plan.masked, plan.visible[1:4], plan.masked[:0]):
                rows = model.decode(encoder_out, plan, drops, wanted)
                want = everything.index_select(0, wanted.long())
                assert torch.allclose(rows, want, rtol=0, atol=1e-12)


def test_only_visible_patches_are_read() -> None:
    """NaN in every masked patch does not reach the outputs: nothing of it is embedded."""
    model = build(STILL)
    spectrogram, plan = batch([0, 2, 4], model.grid)
    clean = model(spectrogram, (plan,), MEAN, SCALE, None)
    frames = torch.full_like(spectrogram.frames, math.nan)
    layout, grid = plan.layout, model.grid
    for token in plan.visible.tolist():
        b = sum(token >= c for c in layout.cu_tokens[1:].tolist())
        column, row = divmod(token - int(layout.cu_tokens[b]), grid.freq)
        start = int(layout.cu_frames[b]) + column * grid.patch_time
        stop = min(start + grid.patch_time, int(layout.cu_frames[b + 1]))
        bins = slice(row * grid.patch_freq, (row + 1) * grid.patch_freq)
        frames[start:stop, bins] = spectrogram.frames[start:stop, bins]
    assert frames.isnan().any()
    for got, want in zip(
        model(replace(spectrogram, frames=frames), (plan,), MEAN, SCALE, None), clean, strict=True
    ):
        assert torch.equal(got, want)


def test_everything_matters() -> None:
    """Every parameter has a gradient, and the prediction depends on visible input and position."""
    model = build(STILL)
    step(model, [0, 1, 2], None)
    for name, p in model.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert float(p.grad.abs().max()) > 0, name


def test_empty_and_one_token_clips() -> None:
    """A clip of one token is visible and predicts nothing, a clip of none is nothing: also a whole batch."""
    grid = GRIDS["frame"]
    model = build(STILL, grid)
    for lengths in ((2, 10), (1, 10, 2), (2,), (1,)):
        spectrogram = Spectrogram(
            torch.cat([clip(b, n) for b, n in enumerate(lengths)]),
            lengths,
            cumulative(lengths, torch.int64, "cpu"),
            torch.arange(len(lengths)),
        )
        layout = grid.layout(spectrogram)
        plan = plan_from_ids(layout, [list(range(visible_count(n, 0.75))) for n in layout.lengths])
        output = model(spectrogram, (plan,), MEAN, SCALE, StepKey.make(0, 0, "cpu"))
        assert output.pred_recon.shape == (sum(plan.n_masked), 16)
        assert all(torch.isfinite(x).all() for x in output)
        objective = JointConfig()
        terms = objective.terms(output, spectrogram, (plan,), MEAN, SCALE)
        loss = total(terms, objective.counts((plan,), grid))
        loss.backward()
        assert torch.isfinite(loss)


def test_autocast_keeps_rows_in_float32() -> None:
    """Under bf16 autocast the result is near that of float32 and the stacks hand on float32."""
    model = build(STILL).float()
    spectrogram, plan = batch([0, 1, 2], model.grid)
    spectrogram = replace(spectrogram, frames=spectrogram.frames.float())
    mean, scale = MEAN.float(), SCALE.float()

    def rows() -> list[Tensor]:
        encoder_out = model(spectrogram, (plan,), mean, scale, None).encoder_out
        return [encoder_out, model.decode(encoder_out, plan, None, None)]

    exact = rows()
    with torch.autocast("cpu", torch.bfloat16):
        output = rows()
    assert all(x.dtype == torch.float32 for x in output)
    assert float((output[1] - exact[1]).detach().abs().max()) < 0.15


def test_wrong_grid_is_refused() -> None:
    model = build(STILL, GRIDS["patch"])
    spectrogram, plan = batch([0], GRIDS["patch freq-major"])
    with pytest.raises(ValueError, match="the plan was made for"):
        model(spectrogram, (plan,), MEAN, SCALE, None)
    _, fitting = batch([0], GRIDS["patch"])
    for plans in ((), (fitting, fitting)):
        with pytest.raises(ValueError, match=f"MaeAst: needs 1 plans a clip, received {len(plans)}"):
            model(spectrogram, plans, MEAN, SCALE, None)


def test_positions_of_any_length() -> None:
    """The cached table grows; rows do not depend on when it was made; it is the sine of float64."""
    positions = Positions(sincos_table, 10)
    short = positions.at(torch.arange(5), 5, torch.float32)
    long = positions.at(torch.arange(3000), 3000, torch.float32)
    assert torch.equal(short, long[:5]) and torch.equal(long, sincos_table(3000, 10))
    t = torch.arange(50, dtype=torch.float64)[:, None]
    rate = 10000.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    assert torch.allclose(long[:50, 0::2].double(), torch.sin(t * rate), rtol=0, atol=4e-6)
    assert torch.allclose(long[:50, 1::2].double(), torch.cos(t * rate), rtol=0, atol=4e-6)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name: str) -> None:
    config = MaeAstConfig(**SIZES[name])
    assert from_dict(MaeAstConfig, to_dict(config)) == config
    assert name != "base" or config == MaeAstConfig()


def test_published_parameter_count() -> None:
    """12 + 2 blocks of 7,087,872; patch embedding, heads, two LayerNorms and the mask token by hand."""
    with torch.device("meta"):
        model = MaeAst(MaeAstConfig(), TokenGrid(freq=8, patch_freq=16, patch_time=16, order="time"), NORM)
    heads = 2 * (768 * 256 + 256)
    want = 14 * 7_087_872 + (256 * 768 + 768) + heads + 2 * 2 * 768 + 768
    assert sum(p.numel() for p in model.parameters()) == want


def test_adapter_with_a_bridge_and_wrong_names() -> None:
    """Widths that differ bring post_enc_proj; missing, unknown and misshapen names are all named."""
    same = replace(STILL, decoder_embed_dim=16, decoder_heads=2, bridge=True)
    bridged = export_state(MaeAst(same, GRIDS["patch"], NORM).state_dict())
    assert config_from_state(bridged, heads=2).has_bridge
    del bridged["post_enc_proj.weight"], bridged["post_enc_proj.bias"]
    assert not config_from_state(bridged, heads=2).has_bridge
    model = MaeAst(STILL, GRIDS["patch"], NORM)
    state = export_state(model.state_dict())
    assert "post_enc_proj.weight" in state
    back = import_state(state, model.state_dict())
    assert all(torch.equal(back[n], t) for n, t in model.state_dict().items())
    state["encoder.layers.0.fc1.weight"] = torch.zeros(3, 3)
    del state["encoder.layers.1.self_attn.q_proj.bias"]
    state["surprise"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as error:
        import_state(state, model.state_dict())
    for words in (
        "3 of the names",
        "missing encoder.layers.1.self_attn.q_proj.bias",
        "unknown surprise",
        r"(3, 3)",
    ):
        assert words in str(error.value)
    with pytest.raises(CheckpointError, match="expected a state dict of MAE-AST"):
        config_from_state({"weight": torch.zeros(1)}, heads=2)


def test_registry() -> None:
    model = registry.build(STILL, GRIDS["patch"], NORM)
    assert isinstance(model, MaeAst)
    with pytest.raises(ConfigError, match="no model takes a InputNormConfig; allowed: MaeAstConfig"):
        registry.build(NORM, GRIDS["patch"], NORM)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed_dim": 100, "heads": 12}, "embed_dim: must be even and a multiple of model.heads"),
        ({"decoder_embed_dim": 33, "decoder_heads": 3}, "decoder_embed_dim: must be even"),
        ({"encoder_layers": 0}, "encoder_layers: must be at least 1; received 0"),
        ({"decoder_layers": 512}, "decoder_layers: must be below 512"),
        ({"dropout": 1.0}, r"dropout: must lie in \[0, 0.9999\); received 1.0"),
        ({"encoder_layerdrop": -0.1}, "encoder_layerdrop: must lie in"),
    ],
)
def test_bad_config(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MaeAstConfig(**change)


def test_visible_order_is_that_of_the_plan() -> None:
    """Clip boundaries: rows of the output follow the plan's ascending ids."""
    _, plan = batch([0, 1, 2], GRIDS["patch"])
    assert all(a < b for a, b in pairwise(plan.visible.tolist()))
