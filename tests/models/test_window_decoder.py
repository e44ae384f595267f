# SPDX-License-Identifier: Apache-2.0
"""The window decoder against the published method written plainly (rolled grid, windows cut out, edge masked), its
rows and windows on any grid, dropout of the position bias, its cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from masktrain.errors import ConfigError
from masktrain.masking.plan import plan_from_ids
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae import EPS, Mae, MaeConfig
from masktrain.models.transformer import STACK_SITES
from masktrain.models.window_decoder import WindowBlock, WindowDecoder, Windows, window_columns
from masktrain.objectives.reconstruction import ReconstructionConfig
from masktrain.objectives.registry import total
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, TokenLayout, cumulative

NORM = InputNormConfig(kind="global", factor=1.0, dataset_mean=-4.0, dataset_std=2.0)
CONFIG = MaeConfig(
    encoder_layers=1,
    embed_dim=8,
    ffn_dim=16,
    heads=2,
    decoder_layers=3,
    decoder_embed_dim=16,
    decoder_ffn_dim=24,
    decoder_heads=4,
    decoder="window",
)
MEAN, SCALE = torch.full((1,), -4.0, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)


def grid_of(freq: int, order: str = "time") -> TokenGrid:
    return TokenGrid(freq=freq, patch_freq=2, patch_time=2, order=order, partial="drop")  # type: ignore[arg-type]


def build(grid: TokenGrid, config: MaeConfig = CONFIG) -> Mae:
    torch.manual_seed(0)
    model = Mae(config, grid, NORM).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.rand_like(p) if name.endswith("tau") else 0.2 * torch.randn_like(p))
    return model.train()


def batch(grid: TokenGrid, columns: tuple[int, ...]) -> tuple[Spectrogram, MaskPlan]:
    """Clips of so many columns; what a clip holds depends on its place in the list of lengths alone."""
    generator = torch.Generator().manual_seed(sum(columns))
    lengths = tuple(grid.patch_time * c for c in columns)
    frames = torch.randn(sum(lengths), 2 * grid.freq, generator=generator, dtype=torch.float64) - 4
    ids = torch.arange(len(columns)) + 7
    spectrogram = Spectrogram(frames, lengths, cumulative(lengths, torch.int64, "cpu"), ids)
    layout = grid.layout(spectrogram)
    shown = [
        torch.randperm(n, generator=generator)[: max(min(n, 1), n // 4)].tolist() for n in layout.lengths
    ]
    return spectrogram, plan_from_ids(layout, shown)


def layer_norm(layer: torch.nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, EPS)  # type: ignore[arg-type]


def attention(part: WindowBlock, x: Tensor, height: int, width: int, mask: Tensor) -> Tensor:
    """x: (windows, n, D), n = columns x rows of a window; mask: (windows, n, n) is added to the scores."""
    config = part.config
    n = x.shape[1]
    qkv = part.qkv(x).view(len(x), n, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    scores = q @ k.mT / (q.norm(dim=-1)[..., None] * k.norm(dim=-1)[..., None, :]).clamp(min=1e-6)
    place = torch.tensor([(c, r) for c in range(width) for r in range(height)])
    offsets = (place[:, None] - place[None]).reshape(-1, 2).float()
    offsets = (offsets.sign() * torch.log(1 + offsets.abs())).double()  # kept in float32
    bias = part.position_fc2(F.relu(part.position_fc1(offsets))).T.view(config.heads, n, n)
    scores = scores / part.tau.clamp(min=0.01)[:, None, None] + bias + mask[:, None]
    return part.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def published(decoder: WindowDecoder, x: Tensor, columns: int, freq: int) -> Tensor:
    """The published decoder on one clip of (columns * freq, D) rows, time outer: columns and rows multiples of 4."""
    for layer, part in enumerate(decoder.blocks):
        shift = 2 if layer % 2 else 0
        y = torch.roll(x.view(columns, freq, -1), -shift, 0)
        region = torch.zeros(columns)
        if shift:
            region[columns - 4 : columns - 2], region[columns - 2 :] = 1, 2
        y = y.view(columns // 4, 4, freq // 4, 4, -1).transpose(1, 2).reshape(-1, 16, x.shape[1])
        region = region.view(columns // 4, 4)[:, None, :, None].expand(-1, freq // 4, 4, 4).reshape(-1, 16)
        mask = torch.where(region[:, None] != region[:, :, None], -100.0, 0.0).double()
        y = attention(part, y, 4, 4, mask)
        y = y.view(columns // 4, freq // 4, 4, 4, -1).transpose(1, 2).reshape(columns, freq, -1)
        y = torch.roll(y, shift, 0).flatten(0, 1)
        x = x + layer_norm(part.attention_norm, y)
        x = x + layer_norm(part.ffn_norm, part.fc2(F.gelu(part.fc1(x))))
    return layer_norm(decoder.norm, x)


def one_by_one(decoder: WindowDecoder, x: Tensor, columns: int, freq: int) -> Tensor:
    """The same on a clip of any size, window by window."""
    for layer, part in enumerate(decoder.blocks):
        y = torch.zeros_like(x).view(columns, freq, -1)
        cells = x.view(columns, freq, -1)
        cuts = [0, *range(2, columns, 4)] if layer % 2 and columns > 4 else list(range(0, columns, 4))
        for start, end in zip(cuts, [*cuts[1:], columns], strict=True):
            for low in range(0, freq, 4):
                window = cells[start:end, low : low + 4]
                width, height = window.shape[:2]
                n = width * height
                out = attention(part, window.reshape(1, n, -1), height, width, torch.zeros(1, n, n).double())
                y = y.clone()
                y[start:end, low : low + 4] = out.view(width, height, -1)
        x = x + layer_norm(part.attention_norm, y.flatten(0, 1))
        x = x + layer_norm(part.ffn_norm, part.fc2(F.gelu(part.fc1(x))))
    return layer_norm(decoder.norm, x)


def plain_loss(model: Mae, spectrogram: Spectrogram, plan: MaskPlan, method: object) -> tuple[Tensor, Tensor]:
    """Loss and the decoder's rows in token order, clip by clip, all rows through all blocks."""
    grid, decoder = model.grid, model.decoder
    assert isinstance(decoder, WindowDecoder) and callable(method)
    encoder_out = model.encode(spectrogram, plan, MEAN, SCALE, None)
    rows, place = [], 0
    for b, n in enumerate(plan.layout.lengths):
        first, columns = int(plan.layout.cu_tokens[b]), plan.layout.columns[b]
        tokens = torch.arange(first, first + n)
        visible = plan.visible.long()[(plan.visible >= first) & (plan.visible < first + n)]
        encoded = model.bridge(encoder_out[place + 1 : place + 1 + len(visible)])
        place += 1 + len(visible)
        x = model.mask_token.expand(n, -1).index_copy(0, visible - first, encoded)
        x = x + model.decoder_positions.of(plan.layout, tokens, torch.float64)
        if grid.order == "freq":
            x = x.view(grid.freq, columns, -1).transpose(0, 1).flatten(0, 1)
        if columns:
            x = method(decoder, x, columns, grid.freq)
        if grid.order == "freq":
            x = x.view(columns, grid.freq, -1).transpose(0, 1).flatten(0, 1)
        rows.append(x)
    everything = torch.cat(rows)
    predicted = model.reconstruction_head(everything[plan.masked.long()])
    objective = ReconstructionConfig()
    terms = objective._terms(predicted, spectrogram, (plan,), MEAN, SCALE)
    return total(terms, objective.counts((plan,), grid)), everything


@pytest.mark.parametrize(
    ("columns", "freq", "order", "method"),
    [
        ((8, 8), 8, "time", published),
        ((64,), 4, "time", published),
        ((8, 12, 16), 8, "freq", published),
        ((31, 5, 1, 6, 4, 3, 9), 8, "time", one_by_one),
        ((7, 2, 10), 5, "freq", one_by_one),
        ((7, 2, 0, 10), 3, "time", one_by_one),
        ((9, 4), 1, "time", one_by_one),
    ],
)
def test_the_published_method(columns: tuple[int, ...], freq: int, order: str, method: object) -> None:
    """Rows of all clips together, no roll, the last block on masked rows alone: outputs, loss and gradients."""
    model = build(grid_of(freq, order), replace(CONFIG, position_dropout=0.0))
    spectrogram, plan = batch(model.grid, columns)
    prediction = model(spectrogram, (plan,), MEAN, SCALE, StepKey.make(0, 0, "cpu"))
    objective = ReconstructionConfig()
    terms = objective.terms(prediction, spectrogram, (plan,), MEAN, SCALE)
    loss = total(terms, objective.counts((plan,), model.grid))
    loss.backward()
    ours = {}
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        ours[name] = p.grad.clone()
    model.zero_grad()
    want, everything = plain_loss(model, spectrogram, plan, method)
    want.backward()
    assert float((loss - want).detach().abs()) < 1e-10 * float(want)
    with torch.no_grad():
        got = model.decode(prediction.encoder_out, plan, None, None)
    assert float((got - everything).detach().abs().max()) < 1e-10
    for name, p in model.named_parameters():
        assert p.grad is not None
        size = 1 + float(p.grad.abs().max())
        assert float((ours[name] - p.grad).abs().max()) < 1e-10 * size, name
        assert float(p.grad.abs().max()) > 0 or name.endswith("position_fc2.bias") or freq == 1, name


@pytest.mark.parametrize("order", ["time", "freq"])
@pytest.mark.parametrize("freq", [1, 3, 4, 5, 8])
def test_rows_and_windows(freq: int, order: str) -> None:
    """Rows are a permutation of the tokens, and every window of both cuts a run of rows inside 4 x 4 tokens of one
    clip."""
    columns = (7, 1, 0, 16, 5, 4)
    layout: TokenLayout = batch(grid_of(freq, order), columns)[1].layout
    windows = Windows(layout)
    rows = windows.rows()
    assert rows.sort().values.tolist() == list(range(len(rows)))
    where = {}
    first = 0
    for b, c in enumerate(columns):
        for t in range(freq * c):
            column, row = (t // freq, t % freq) if order == "time" else (t % c, t // c)
            where[int(rows[first + t])] = (b, column, row)
        first += freq * c
    for shifted in (False, True):
        cuts = [(windows.cu_rows(shifted), 0)]
        if windows.rest:
            start = windows.full * windows.height * windows.columns
            cuts.append((windows.cuts[shifted] * windows.rest, start))
        seen = 0
        for cu, start in cuts:
            for low, high in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
                cells = [where[start + r] for r in range(low, high)]
                seen += len(cells)
                assert cells == sorted(cells) and len({b for b, _, _ in cells}) == 1
                at, rows_of = {c for _, c, _ in cells}, {r for _, _, r in cells}
                assert max(at) - min(at) < 4 and len({r // 4 for r in rows_of}) == 1
                assert len(cells) == len(at) * len(rows_of)
                edge = shifted and columns[cells[0][0]] > 4
                assert min(at) == 0 or min(at) % 4 == (2 if edge else 0)
        assert seen == len(rows)


def test_columns_of_windows() -> None:
    """The published 64 columns shifted by 2, short clips not at all."""
    assert window_columns(64, True) == [2, *[4] * 15, 2] and window_columns(64, False) == [4] * 16
    assert window_columns(31, True) == [2, *[4] * 7, 1] and window_columns(5, True) == [2, 3]
    for columns in (0, 1, 3, 4):
        assert window_columns(columns, True) == window_columns(columns, False) == [columns] * (columns > 0)


def test_a_clip_does_not_depend_on_its_batch() -> None:
    """Also with dropout of the position bias, which is the same for all clips of a step."""
    model = build(grid_of(8))
    key = StepKey.make(3, 4, "cpu")
    spectrogram, plan = batch(model.grid, (9, 6, 12))
    whole = model(spectrogram, (plan,), MEAN, SCALE, key).pred_recon
    assert whole is not None
    for b, rows in enumerate(whole.split(plan.n_masked)):
        frames = spectrogram.clip(b)
        one = Spectrogram(
            frames,
            (len(frames),),
            cumulative((len(frames),), torch.int64, "cpu"),
            spectrogram.clip_ids[b : b + 1],
        )
        first = int(plan.layout.cu_tokens[b])
        shown = [t - first for t in plan.visible.tolist() if first <= t < first + plan.layout.lengths[b]]
        alone = model(one, (plan_from_ids(model.grid.layout(one), [shown]),), MEAN, SCALE, key).pred_recon
        assert alone is not None and float((alone - rows).detach().abs().max()) < 1e-10


def test_dropout_of_the_position_bias() -> None:
    """At its rate after both layers, other bits in each block and step, none without a key or in evaluation."""
    model = build(grid_of(8), replace(CONFIG, position_dropout=0.25))
    decoder = model.decoder
    assert isinstance(decoder, WindowDecoder)
    keys = [StepKey.make(1, s, "cpu") for s in range(3)]
    still = [block.position_bias(decoder.offsets, None) for block in decoder.blocks]
    found = [[block.position_bias(decoder.offsets, key) for key in keys] for block in decoder.blocks]
    patterns = {tuple((bias == 0).flatten().tolist()) for biases in found for bias in biases}
    assert len(patterns) == 9 and all(bool((bias != 0).all()) for bias in still)
    values = torch.stack([bias for biases in found for bias in biases])
    share, n = float((values == 0).double().mean()), values.numel()
    assert abs(share - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)
    # hidden values are dropped as well: what is kept of the bias is not the still one, scaled
    kept = found[0][0] != 0
    assert float((found[0][0] - still[0] / 0.75)[kept].detach().abs().mean()) > 1e-3
    spectrogram, plan = batch(model.grid, (9, 6))
    outputs = [
        model(spectrogram, (plan,), MEAN, SCALE, key).pred_recon for key in (keys[0], keys[0], keys[1])
    ]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    plain = model(spectrogram, (plan,), MEAN, SCALE, None).pred_recon
    assert torch.equal(model.eval()(spectrogram, (plan,), MEAN, SCALE, keys[0]).pred_recon, plain)
    sites = [block.site + i for block in decoder.blocks for i in range(2)]
    assert len(set(sites)) == len(sites) and all(2 * STACK_SITES <= s < 3 * STACK_SITES for s in sites)


def test_slope_with_dropout() -> None:
    """With dropout on, the slope along a random direction of all weights is that of the loss itself."""
    model = build(grid_of(8))
    spectrogram, plan = batch(model.grid, (9, 6))
    key, objective = StepKey.make(2, 2, "cpu"), ReconstructionConfig()

    def loss() -> Tensor:
        terms = objective.terms(
            model(spectrogram, (plan,), MEAN, SCALE, key), spectrogram, (plan,), MEAN, SCALE
        )
        return total(terms, objective.counts((plan,), model.grid))

    weights = list(model.parameters())
    grads = torch.autograd.grad(loss(), weights)
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in weights]
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(weights, along, strict=True):
                p.add_(d, alpha=sign * 1e-6)
            values.append(float(loss()))
            for p, d in zip(weights, along, strict=True):
                p.sub_(d, alpha=sign * 1e-6)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, along, strict=True))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("columns", [(8, 8), (31, 5, 1)])
@pytest.mark.parametrize("freq", [8, 5])
def test_flops(monkeypatch: pytest.MonkeyPatch, columns: tuple[int, ...], freq: int) -> None:
    """What torch counts, less what the reference pads windows with."""
    monkeypatch.setenv("MASKTRAIN_KERNELS", "reference")
    model = build(grid_of(freq))
    spectrogram, plan = batch(model.grid, columns)
    with FlopCounterMode(display=False) as counter:
        prediction = model(spectrogram, (plan,), MEAN, SCALE, StepKey.make(0, 0, "cpu"))
        assert prediction.pred_recon is not None
        prediction.pred_recon.sum().backward()
    padding = 0
    for layer in range(CONFIG.decoder_layers):
        for height in [4] * (freq // 4) + [freq % 4] * (freq % 4 > 0):
            sizes = [n * height for c in columns for n in window_columns(c, layer % 2 == 1)]
            padding += 3 * 4 * CONFIG.decoder_embed_dim * sum((4 * height) ** 2 - n * n for n in sizes)
    assert model.train_flops((plan,)) == counter.get_total_flops() - padding


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_bytes_kept_for_backward(monkeypatch: pytest.MonkeyPatch, p: float) -> None:
    """Within 5 % of what autograd really keeps, parameters and the spectrogram aside."""
    monkeypatch.delenv("MASKTRAIN_KERNELS", raising=False)
    sizes = {"embed_dim": 128, "ffn_dim": 512, "heads": 4}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()}
    config = replace(CONFIG, **sizes, **decoder, decoder_layers=2, position_dropout=p)
    model = build(grid_of(8), config).float()
    spectrogram, plan = batch(model.grid, (64, 64, 64))
    spectrogram = replace(spectrogram, frames=spectrogram.frames.float())
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

    mean, scale = MEAN.float(), SCALE.float()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        prediction = model(spectrogram, (plan,), mean, scale, StepKey.make(0, 0, "cpu"))
        ReconstructionConfig().terms(prediction, spectrogram, (plan,), mean, scale)
    assert model.activation_bytes(512, 3, 0.75) == pytest.approx(sum(kept.values()), rel=0.05)


def test_config() -> None:
    with pytest.raises(ConfigError, match=r"model.position_dropout: must lie in \[0, 0.9999\)"):
        replace(CONFIG, position_dropout=1.0)


def test_names_of_weights() -> None:
    """Checkpoints hold these names: what changes them breaks every stored run."""
    model = Mae(replace(CONFIG, decoder_layers=1), grid_of(8), NORM)
    linear = ("qkv", "out", "fc1", "fc2", "position_fc1", "position_fc2", "attention_norm", "ffn_norm")
    want = {f"blocks.0.{part}.{leaf}" for part in linear for leaf in ("weight", "bias")}
    assert model.decoder.state_dict().keys() == want | {"blocks.0.tau", "norm.weight", "norm.bias"}
