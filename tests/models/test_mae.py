# SPDX-License-Identifier: Apache-2.0
"""The masked autoencoder against a dense transcription of the method, clip by clip, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from masktrain.config import from_dict, to_dict
from masktrain.errors import CheckpointError, ConfigError
from masktrain.masking.plan import plan_from_ids, visible_count
from masktrain.models import registry
from masktrain.models.adapters.mae import export_state, import_state
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae import EPS, Mae, MaeConfig
from masktrain.models.pretrainer import Prediction
from masktrain.models.transformer import Block, KeylessQkv
from masktrain.objectives.reconstruction import ReconstructionConfig
from masktrain.objectives.registry import total
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, cumulative

NORM = InputNormConfig(kind="global", factor=1.0, dataset_mean=-4.0, dataset_std=2.0)
CONFIG = MaeConfig(
    encoder_layers=2,
    embed_dim=16,
    ffn_dim=32,
    heads=2,
    decoder_layers=2,
    decoder_embed_dim=12,
    decoder_ffn_dim=40,
    decoder_heads=3,
)
CONFIGS = {
    "maskspec": CONFIG,
    "no class token": replace(CONFIG, cls_token=False),
    "msm_mae": replace(CONFIG, key_bias=False, decoder_positions="sincos_1d"),
    "audiomae": replace(CONFIG, positions="sincos_2d_transposed", decoder_positions="sincos_2d_transposed"),
    "one layer": replace(CONFIG, encoder_layers=1, decoder_layers=1),
}
GRIDS = {
    "freq-major": TokenGrid(freq=2, patch_freq=4, patch_time=3, order="freq"),
    "time-major": TokenGrid(freq=2, patch_freq=4, patch_time=3, order="time"),
}
FREQ = GRIDS["freq-major"]
LENGTHS = (30, 12, 41, 30, 7)
MEAN, SCALE = torch.full((1,), -4.0, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)


def build(config: MaeConfig = CONFIG, grid: TokenGrid = FREQ) -> Mae:
    """A float64 model with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = Mae(config, grid, NORM).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.train()


def batch(places: list[int], grid: TokenGrid, ratio: float = 0.6) -> tuple[Spectrogram, MaskPlan]:
    """The clips of LENGTHS at `places`; a clip's frames, id and mask do not depend on where it stands."""
    lengths = tuple(LENGTHS[b] for b in places)
    frames = [
        torch.randn(LENGTHS[b], 8, generator=torch.Generator().manual_seed(b), dtype=torch.float64) - 4
        for b in places
    ]
    spectrogram = Spectrogram(
        torch.cat(frames), lengths, cumulative(lengths, torch.int64, "cpu"), torch.tensor(places)
    )
    layout = grid.layout(spectrogram)
    ids = []
    for b, n in zip(places, layout.lengths, strict=True):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(b)).tolist()
        ids.append(order[: visible_count(n, ratio)])
    return spectrogram, plan_from_ids(layout, ids)


# The method, written plainly for one clip: all patches are embedded, then the visible ones are taken; all tokens
# go through the whole decoder.


def patches_of(frames: Tensor, grid: TokenGrid) -> Tensor:
    """(N, P) normalised patches of one clip, frames that are not there being 0."""
    columns = grid.columns(len(frames))
    full = torch.zeros(columns * grid.patch_time, frames.shape[1], dtype=frames.dtype)
    n = min(len(frames), len(full))
    full[:n] = (frames[:n] + 4) * 0.5
    cells = full.view(columns, grid.patch_time, grid.freq, grid.patch_freq)
    order = (0, 2, 1, 3) if grid.order == "time" else (2, 0, 3, 1)
    return cells.permute(order).reshape(columns * grid.freq, -1)


def sines(numbers: Tensor, width: int, interleaved: bool = False) -> Tensor:
    angles = numbers[:, None].double() / 10000 ** (torch.arange(0, width, 2).double() / width)
    parts = [angles.sin(), angles.cos()]
    table = torch.stack(parts, 2).flatten(1) if interleaved else torch.cat(parts, 1)
    return table.float().double()  # tables are kept in float32


def positions_of(kind: str, grid: TokenGrid, columns: int, width: int) -> Tensor:
    number = torch.arange(grid.freq * columns)
    if kind == "sincos_1d":
        return sines(number, width, interleaved=True)
    outer, inner = (columns, grid.freq) if grid.order == "time" else (grid.freq, columns)
    extent = outer if kind == "sincos_2d_transposed" else inner
    return torch.cat([sines(number % extent, width // 2), sines(number // extent, width // 2)], 1)


def block(part: Block, x: Tensor) -> Tensor:
    def norm(layer: torch.nn.Module, values: Tensor) -> Tensor:
        return F.layer_norm(values, values.shape[-1:], layer.weight, layer.bias, EPS)  # type: ignore[arg-type]

    qkv = part.qkv
    if isinstance(qkv, KeylessQkv):
        weight, bias = qkv.linear.weight, torch.cat([qkv.q_bias, 0 * qkv.q_bias, qkv.v_bias])
    else:
        weight, bias = qkv.weight, qkv.bias
    heads = part.config.heads
    q, k, v = (norm(part.attention_norm, x) @ weight.T + bias).chunk(3, dim=1)
    out = []
    for one in range(heads):
        rows = slice(one * q.shape[1] // heads, (one + 1) * q.shape[1] // heads)
        logits = q[:, rows] @ k[:, rows].T / math.sqrt(q.shape[1] // heads)
        out.append(logits.softmax(1) @ v[:, rows])
    x = x + part.out(torch.cat(out, 1))
    return x + part.fc2(F.gelu(part.fc1(norm(part.ffn_norm, x))))


def dense(model: Mae, frames: Tensor, visible: list[int]) -> tuple[Tensor, Tensor]:
    """Return the encoder's output and the prediction of every token of one clip."""
    grid, config = model.grid, model.config
    columns = grid.columns(len(frames))
    x = model.patch_embed(patches_of(frames, grid))
    x = (x + positions_of(config.positions, grid, columns, config.embed_dim))[visible]
    if model.cls_token is not None:
        x = torch.cat([model.cls_token, x])
    for part in model.encoder.blocks:
        x = block(part, x)
    encoder_out = F.layer_norm(x, x.shape[-1:], model.encoder.norm.weight, model.encoder.norm.bias, EPS)
    x = model.bridge(encoder_out)
    extra = len(x) - len(visible)
    tokens = model.mask_token.expand(grid.freq * columns, -1).index_copy(0, torch.tensor(visible), x[extra:])
    tokens = tokens + positions_of(config.decoder_positions, grid, columns, config.decoder_embed_dim)
    x = torch.cat([x[:extra], tokens])
    for part in model.decoder.blocks:
        x = block(part, x)
    x = F.layer_norm(x, x.shape[-1:], model.decoder.norm.weight, model.decoder.norm.bias, EPS)
    return encoder_out, model.reconstruction_head(x[extra:])


def reference_loss(model: Mae, spectrogram: Spectrogram, plan: MaskPlan) -> tuple[Tensor, Prediction]:
    """Loss, encoder output and predictions of a batch by `dense`, standardised targets."""
    first, rows, predicted, squares = plan.layout.cu_tokens.tolist(), [], [], []
    for b, n in enumerate(plan.layout.lengths):
        visible = [t - first[b] for t in plan.visible.tolist() if first[b] <= t < first[b] + n]
        masked = [t for t in range(n) if t not in visible]
        encoder_out, everything = dense(model, spectrogram.clip(b), visible)
        target = patches_of(spectrogram.clip(b), model.grid)[masked]
        target = (target - target.mean(1, keepdim=True)) / (target.var(1, keepdim=True) + 1e-6).sqrt()
        rows.append(encoder_out)
        predicted.append(everything[masked])
        squares.append((everything[masked] - target).square().sum())
    pred = torch.cat(predicted)
    return torch.stack(squares).sum() / pred.numel(), Prediction(torch.cat(rows), pred, None)


def step(model: Mae, places: list[int]) -> tuple[Tensor, Prediction]:
    spectrogram, plan = batch(places, model.grid)
    prediction = model(spectrogram, (plan,), MEAN, SCALE, StepKey.make(0, 0, "cpu"))
    objective = ReconstructionConfig(norm_pix_loss=True)
    terms = objective.terms(prediction, spectrogram, (plan,), MEAN, SCALE)
    loss = total(terms, objective.counts((plan,), model.grid))
    loss.backward()
    return loss.detach(), prediction


def gradients(model: Mae) -> dict[str, Tensor]:
    found = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        found[name] = p.grad.clone()
    model.zero_grad(set_to_none=True)
    return found


def equal(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape, what
    size = 1 + float(theirs.abs().max()) if theirs.numel() else 1.0
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10 * size), what


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_packed_clips_are_the_dense_method(config: MaeConfig, grid: TokenGrid) -> None:
    """Clips of unequal length, only visible patches read, only masked rows behind the last attention: outputs, loss
    and every gradient are those of the plain method clip by clip."""
    model = build(config, grid)
    places = [0, 1, 2, 3, 4]
    loss, prediction = step(model, places)
    ours = gradients(model)
    want, plain = reference_loss(model, *batch(places, grid))
    want.backward()
    equal(prediction.encoder_out, plain.encoder_out)
    assert prediction.pred_recon is not None and plain.pred_recon is not None
    equal(prediction.pred_recon, plain.pred_recon)
    assert prediction.pred_class is None
    equal(loss, want.detach())
    for name, grad in gradients(model).items():
        equal(ours[name], grad, name)
        assert float(grad.abs().max()) > 0, name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_wanted_rows_are_those_of_all(config: MaeConfig) -> None:
    model = build(config)
    spectrogram, plan = batch([0, 4, 2], model.grid)
    extra = int(config.cls_token)
    encoder_out = model.encode(spectrogram, plan, MEAN, SCALE, None)
    everything = model.decode(encoder_out, plan, None, None)
    assert len(everything) == sum(plan.layout.lengths) + 3 * extra
    starts = plan.layout.cu_tokens.tolist()
    row = [t + extra * (b + 1) for b in range(3) for t in range(starts[b], starts[b + 1])]
    for wanted in (plan.masked, plan.visible, plan.masked[1::3], plan.masked[:0]):
        want = everything[[row[t] for t in wanted.tolist()]]
        equal(model.decode(encoder_out, plan, None, wanted), want)


def test_only_visible_patches_are_read() -> None:
    """NaN in every masked patch does not reach the outputs."""
    model = build()
    spectrogram, plan = batch([0, 2, 4], model.grid)
    clean = model(spectrogram, (plan,), MEAN, SCALE, None)
    parts = []
    for b, n in enumerate(plan.layout.lengths):
        frames = spectrogram.clip(b).clone()
        first, columns = int(plan.layout.cu_tokens[b]), plan.layout.columns[b]
        for t in set(range(first, first + n)) - set(plan.visible.tolist()):
            row, column = divmod(t - first, columns)
            frames[3 * column : 3 * column + 3, 4 * row : 4 * row + 4] = math.nan
        parts.append(frames)
    frames = torch.cat(parts)
    assert frames.isnan().any()
    poisoned = model(replace(spectrogram, frames=frames), (plan,), MEAN, SCALE, None)
    assert torch.equal(poisoned.encoder_out, clean.encoder_out)
    assert torch.equal(poisoned.pred_recon, clean.pred_recon)


@pytest.mark.parametrize("cls_token", [True, False])
def test_clips_of_one_token(cls_token: bool) -> None:
    """A clip of one token is visible and predicts nothing: also a whole batch."""
    grid = TokenGrid(freq=1, patch_freq=8, patch_time=2, order="freq", partial="drop")
    model = build(replace(CONFIG, cls_token=cls_token), grid)
    for lengths in ((2, 10), (10, 2, 10), (2,), (2, 3)):
        frames = torch.randn(sum(lengths), 8, dtype=torch.float64)
        spectrogram = Spectrogram(
            frames, lengths, cumulative(lengths, torch.int64, "cpu"), torch.arange(len(lengths))
        )
        layout = grid.layout(spectrogram)
        plan = plan_from_ids(layout, [list(range(visible_count(n, 0.75))) for n in layout.lengths])
        objective = ReconstructionConfig()
        output = model(spectrogram, (plan,), MEAN, SCALE, None)
        assert output.pred_recon is not None and output.pred_recon.shape == (sum(plan.n_masked), 16)
        assert torch.isfinite(output.encoder_out).all() and torch.isfinite(output.pred_recon).all()
        terms = objective.terms(output, spectrogram, (plan,), MEAN, SCALE)
        loss = total(terms, objective.counts((plan,), grid))
        loss.backward()
        assert torch.isfinite(loss)


def test_autocast_keeps_rows_in_float32() -> None:
    """Under bf16 autocast the prediction is near that of float32 and the stacks hand on float32."""
    model = build().float()
    spectrogram, plan = batch([0, 1, 2], model.grid)
    spectrogram = replace(spectrogram, frames=spectrogram.frames.float())
    exact = model(spectrogram, (plan,), MEAN.float(), SCALE.float(), None)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(spectrogram, (plan,), MEAN.float(), SCALE.float(), None)
    assert output.encoder_out.dtype == torch.float32
    assert float((output.pred_recon.float() - exact.pred_recon).detach().abs().max()) < 0.3


def test_wrong_plans_are_refused() -> None:
    model = build()
    spectrogram, plan = batch([0], GRIDS["time-major"])
    with pytest.raises(ValueError, match="Mae: the plan was made for"):
        model(spectrogram, (plan,), MEAN, SCALE, None)
    _, plan = batch([0], FREQ)
    for plans in ((), (plan, plan)):
        with pytest.raises(ValueError, match=f"Mae: needs 1 plans a clip, received {len(plans)}"):
            model(spectrogram, plans, MEAN, SCALE, None)


def test_names_of_weights() -> None:
    """Checkpoints hold these names: what changes them breaks every stored run."""
    norms = ["attention_norm", "ffn_norm"]
    linear = ["qkv", "out", "fc1", "fc2"]
    blocks = [f"blocks.0.{part}.{leaf}" for part in (*norms, *linear) for leaf in ("weight", "bias")]
    stack = ["norm.weight", "norm.bias", *blocks]
    want = {"cls_token", "mask_token"}
    want |= {
        f"{n}.{leaf}" for n in ("patch_embed", "bridge", "reconstruction_head") for leaf in ("weight", "bias")
    }
    want |= {f"{name}.{one}" for name in ("encoder", "decoder") for one in stack}
    config = CONFIGS["one layer"]
    state = build(config).state_dict()
    assert state.keys() == want
    assert state["cls_token"].shape == (1, 16) and state["mask_token"].shape == (1, 12)
    bare = build(replace(config, cls_token=False, key_bias=False)).state_dict()
    keyless = {"qkv.linear.weight", "qkv.q_bias", "qkv.v_bias"}
    want -= {"cls_token", *(n for n in want if ".qkv." in n)}
    assert bare.keys() == want | {f"{s}.blocks.0.{n}" for s in ("encoder", "decoder") for n in keyless}
    measured = Mae(config, FREQ, InputNormConfig(kind="per_bin"))
    assert measured.state_dict().keys() - state.keys() == {"input_norm.bin_mean", "input_norm.bin_std"}


def test_published_parameter_counts() -> None:
    """The base encoder on 16 x 16 patches of one channel, 85.25 M as published, and a decoder of 8 x 512."""
    grid = TokenGrid(freq=8, patch_freq=16, patch_time=16, order="freq")
    with torch.device("meta"):
        model = Mae(MaeConfig(), grid, NORM)

    def size(*parts: torch.nn.Module | None) -> int:
        return sum(p.numel() for part in parts if part is not None for p in part.parameters())

    assert size(model.encoder, model.patch_embed) == 85_253_376
    layer = 4 * 512**2 + 2 * 512 * 2048 + 4 * 512 + 2048 + 512 + 4 * 512
    assert size(model.decoder) == 8 * layer + 2 * 512
    rest = (768 * 512 + 512) + (512 * 256 + 256) + 768 + 512
    assert size(model) == size(model.encoder, model.patch_embed, model.decoder) + rest


def test_registry_and_config() -> None:
    assert isinstance(registry.build(CONFIG, FREQ, NORM), Mae)
    assert from_dict(MaeConfig, to_dict(CONFIG)) == CONFIG
    assert not CONFIG.may_drop_layers and CONFIG.masks == 1


@pytest.mark.parametrize("order", ["time", "freq"])
def test_wrong_names_are_all_named(order: str) -> None:
    """Patches that are not square keep the order of their values; missing, unknown and misshapen names are named."""
    grid = TokenGrid(freq=2, patch_freq=4, patch_time=3, order=order)
    model = build(grid=grid)
    state = export_state(model.state_dict(), grid)
    shape = (3, 4) if order == "time" else (4, 3)
    assert state["patch_embed.proj.weight"].shape == (16, 1, *shape)
    # the convolution of the reference over its image is our product with the patches
    image = patches_of(batch([0], grid)[0].clip(0), grid)[0].view(1, 1, *shape)
    conv = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"])
    equal(conv.flatten(), model.patch_embed(image.flatten()))
    back = import_state(state, model.state_dict(), grid)
    assert all(torch.equal(back[n], t) for n, t in model.state_dict().items())
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(3, 3)
    del state["decoder_blocks.1.attn.qkv.bias"]
    state |= {"surprise": torch.zeros(1), "norm_stats": torch.zeros(2)}
    with pytest.raises(CheckpointError) as error:
        import_state(state, model.state_dict(), grid)
    for words in ("3 of the names", "missing decoder_blocks.1.attn.qkv.bias", "unknown surprise", "(3, 3)"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"embed_dim": 18}, "embed_dim: must be a multiple of 4 and of model.heads; received 18 and 2"),
        ({"decoder_heads": 5}, "decoder_embed_dim: must be a multiple of 4"),
        ({"encoder_layers": 0}, "encoder_layers: must be at least 1; received 0"),
        ({"decoder_ffn_dim": 0}, "decoder_ffn_dim: must be at least 1; received 0"),
        ({"encoder_layers": 512}, "encoder_layers: must be below 512"),
    ],
)
def test_bad_config(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(CONFIG, **change)
