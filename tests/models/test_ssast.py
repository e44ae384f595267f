# SPDX-License-Identifier: Apache-2.0
"""SSAST as a whole: passes, clips of any length, positions, what is read, what it costs, what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from masktrain.errors import CheckpointError, ConfigError
from masktrain.masking.plan import plan_from_ids, visible_count
from masktrain.models import registry
from masktrain.models.adapters.ssast import export_state, import_state
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.pretrainer import Prediction
from masktrain.models.ssast import Ssast, SsastConfig
from masktrain.objectives.joint import JointConfig
from masktrain.objectives.registry import total
from masktrain.types import MaskPlan, Spectrogram, TokenGrid, cumulative

NORM = InputNormConfig(kind="global", dataset_mean=-4.0, dataset_std=1.0)
TWO = SsastConfig(encoder_layers=3, embed_dim=16, ffn_dim=32, heads=2, columns=24)
ONE = replace(TWO, passes=1)
GRIDS = {
    "patch": TokenGrid(freq=2, patch_freq=4, patch_time=3, order="freq"),
    "patch time-major": TokenGrid(freq=2, patch_freq=4, patch_time=3, order="time"),
    "frame": TokenGrid(freq=1, patch_freq=8, patch_time=2, order="freq"),
}
LENGTHS = (30, 12, 41, 30, 7, 23)
MEAN, SCALE = torch.full((1,), -4.0, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
COUNTS = {"mse": 1000, "info_nce": 40}
# The softmax over predictions does not see the last bias of the matching head; that over targets sees every parameter.
OBJECTIVE = JointConfig(info_nce_axis="targets")


def build(config: SsastConfig = TWO, grid: TokenGrid = GRIDS["patch"]) -> Ssast:
    """A float64 model with weights large enough that every part matters."""
    torch.manual_seed(0)
    model = Ssast(config, grid, NORM).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def spectrogram_of(places: list[int]) -> Spectrogram:
    """The clips of LENGTHS at `places`."""
    lengths = tuple(LENGTHS[b] for b in places)
    clips = [
        torch.randn(LENGTHS[b], 8, generator=torch.Generator().manual_seed(b), dtype=torch.float64) - 4
        for b in places
    ]
    ids = torch.tensor([1000 + b for b in places])
    return Spectrogram(torch.cat(clips), lengths, cumulative(lengths, torch.int64, "cpu"), ids)


def draw(spectrogram: Spectrogram, grid: TokenGrid, number: int) -> MaskPlan:
    """A mask of each clip that does not depend on where it stands."""
    layout = grid.layout(spectrogram)
    ids = []
    for clip, n in zip(spectrogram.clip_ids.tolist(), layout.lengths, strict=True):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(10 * clip + number)).tolist()
        ids.append(order[: visible_count(n, 0.6)])
    return plan_from_ids(layout, ids)


def batch(places: list[int], model: Ssast) -> tuple[Spectrogram, tuple[MaskPlan, ...]]:
    spectrogram = spectrogram_of(places)
    return spectrogram, tuple(draw(spectrogram, model.grid, i) for i in range(model.config.masks))


def step(model: Ssast, places: list[int]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the predictions of each clip and the loss; adds gradients."""
    spectrogram, plans = batch(places, model)
    output = model(spectrogram, plans, MEAN, SCALE, None)
    loss = total(OBJECTIVE.terms(output, spectrogram, plans, MEAN, SCALE), COUNTS)
    loss.backward()
    clips = {}
    for name, value, plan in (
        ("pred_recon", output.pred_recon, plans[-1]),
        ("pred_class", output.pred_class, plans[0]),
    ):
        for b, rows in zip(places, value.detach().split(plan.n_masked), strict=True):
            clips[f"{name}/{b}"] = rows
    return clips, loss.detach()


def gradients(model: Ssast) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        size = float(want[name].abs().max()) if want[name].numel() else 0.0
        assert torch.allclose(value, want[name], rtol=0, atol=1e-10 * (size + 1)), name


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
@pytest.mark.parametrize("config", [TWO, ONE], ids=["two passes", "one pass"])
def test_whole_batch_equals_its_parts(grid: TokenGrid, config: SsastConfig) -> None:
    """Clip by clip, in micro-batches or in another order: outputs, loss, gradients to 1e-10."""
    model = build(config, grid)
    outputs, loss = step(model, [0, 1, 2, 3, 4, 5])
    whole = gradients(model)
    assert all(float(grad.abs().max()) > 0 for grad in whole.values())
    assert whole.keys() == dict(model.named_parameters()).keys()
    for parts in ([[0], [1], [2], [3], [4], [5]], [[4, 2], [0, 5, 1], [3]], [[5, 3, 1, 0, 2, 4]]):
        model.zero_grad(set_to_none=True)
        again: dict[str, Tensor] = {}
        summed = torch.zeros((), dtype=torch.float64)
        for part in parts:
            rows, value = step(model, part)
            again |= rows
            summed += value
        same(again, outputs)
        assert abs(float(summed - loss)) < 1e-10 * float(loss)
        same(gradients(model), whole)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())
def test_two_passes_are_two_calls(grid: TokenGrid) -> None:
    """The packed call gives what one call for each mask gives: the first matched, the second reconstructed."""
    model, single = build(TWO, grid), build(ONE, grid)
    spectrogram, plans = batch([0, 2, 4, 5], model)
    output = model(spectrogram, plans, MEAN, SCALE, None)
    terms = OBJECTIVE.terms(output, spectrogram, plans, MEAN, SCALE)
    total(terms, COUNTS).backward()
    first, second = (single(spectrogram, (plan,), MEAN, SCALE, None) for plan in plans)
    separate = {
        "info_nce": OBJECTIVE.terms(first, spectrogram, plans[:1], MEAN, SCALE)["info_nce"],
        "mse": OBJECTIVE.terms(second, spectrogram, plans[1:], MEAN, SCALE)["mse"],
    }
    total(separate, COUNTS).backward()
    assert torch.allclose(output.pred_class, first.pred_class, rtol=0, atol=1e-12)
    assert torch.allclose(output.pred_recon, second.pred_recon, rtol=0, atol=1e-12)
    for name, term in terms.items():
        assert float(term.sum.detach()) == pytest.approx(float(separate[name].sum.detach()), rel=1e-12)
    same(gradients(model), gradients(single))


def test_one_pass_serves_both_heads() -> None:
    """With the same mask for both, two passes say what one does."""
    model, single = build(TWO), build(ONE)
    spectrogram, (plan,) = batch([0, 1, 3], single)
    twice = model(spectrogram, (plan, plan), MEAN, SCALE, None)
    once = single(spectrogram, (plan,), MEAN, SCALE, None)
    assert torch.allclose(twice.pred_class, once.pred_class, rtol=0, atol=1e-12)
    assert torch.allclose(twice.pred_recon, once.pred_recon, rtol=0, atol=1e-12)
    assert torch.allclose(twice.encoder_out, once.encoder_out.repeat(2, 1), rtol=0, atol=1e-12)


def test_short_clips_take_the_first_columns() -> None:
    """A clip of c columns sees row by row the first c positions: the model whose table holds only these agrees."""
    model = build()
    spectrogram, plans = batch([0], model)
    columns = plans[0].layout.columns[0]
    assert columns < TWO.columns
    exact = build(replace(TWO, columns=columns))
    state = model.state_dict()
    table = state["positions"][2:].view(2, TWO.columns, -1)[:, :columns].flatten(0, 1)
    exact.load_state_dict({**state, "positions": torch.cat([state["positions"][:2], table])})
    got, want = (m.encode(spectrogram, plans, MEAN, SCALE) for m in (model, exact))
    assert torch.allclose(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [TWO, ONE], ids=["two passes", "one pass"])
def test_masked_rows_alone(config: SsastConfig) -> None:
    """The rows that training computes are those of all rows, which hold the leading tokens before each clip's."""
    model = build(config)
    spectrogram, plans = batch([0, 1, 5], model)
    everything = model.encode(spectrogram, plans, MEAN, SCALE)
    lengths = plans[0].layout.lengths
    assert len(everything) == len(plans) * (sum(lengths) + 2 * len(lengths))
    rows, start = [], 0
    for plan in plans:
        first = plan.layout.cu_tokens.tolist()
        for b, n in enumerate(lengths):
            masked = [t - first[b] for t in plan.masked.tolist() if first[b] <= t < first[b + 1]]
            rows += [start + 2 + t for t in masked]
            start += n + 2
    output = model(spectrogram, plans, MEAN, SCALE, None)
    assert torch.allclose(output.encoder_out, everything[rows], rtol=0, atol=1e-12)


def test_only_visible_patches_are_read() -> None:
    """NaN in every patch that both passes mask does not reach the predictions."""
    model = build()
    spectrogram, plans = batch([0, 2, 4], model)
    clean = model(spectrogram, plans, MEAN, SCALE, None)
    frames = torch.full_like(spectrogram.frames, math.nan)
    layout, grid = plans[0].layout, model.grid
    for token in torch.cat([plan.visible for plan in plans]).tolist():
        b = sum(token >= c for c in layout.cu_tokens[1:].tolist())
        row, column = divmod(token - int(layout.cu_tokens[b]), layout.columns[b])
        start = int(layout.cu_frames[b]) + column * grid.patch_time
        stop = min(start + grid.patch_time, int(layout.cu_frames[b + 1]))
        bins = slice(row * grid.patch_freq, (row + 1) * grid.patch_freq)
        frames[start:stop, bins] = spectrogram.frames[start:stop, bins]
    assert frames.isnan().any()
    got = model(replace(spectrogram, frames=frames), plans, MEAN, SCALE, None)
    for mine, theirs in zip(got, clean, strict=True):
        assert torch.equal(mine, theirs)


def test_gradients_by_differences() -> None:
    """The slope along a random direction of all weights is that of the loss itself."""
    model = build()
    step(model, [1, 4, 5])
    generator = torch.Generator().manual_seed(3)
    grads = gradients(model)
    weights = dict(model.named_parameters())
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in weights.items()}
    slope = sum(float((grads[n] * direction[n]).sum()) for n in weights)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in weights.items():
                p.add_(direction[n], alpha=sign * 1e-6)
        values.append(float(step(model, [1, 4, 5])[1]))
        with torch.no_grad():
            for n, p in weights.items():
                p.sub_(direction[n], alpha=sign * 1e-6)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_each_implementation_in_a_step(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    """Whatever computes it, a step is the same to 1e-10."""
    monkeypatch.delenv("MASKTRAIN_KERNELS", raising=False)
    chosen = build()
    outputs, loss = step(chosen, [0, 1, 2, 3])
    monkeypatch.setenv("MASKTRAIN_KERNELS", implementation)
    forced = build()
    again, value = step(forced, [0, 1, 2, 3])
    assert abs(float(value - loss)) < 1e-10 * float(loss)
    same(again, outputs)
    same(gradients(forced), gradients(chosen))


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([0, 3], id="equal", marks=pytest.mark.slow(covers=["masktrain/models", "kernels"])),
        pytest.param([0, 1, 5], id="ragged"),
    ],
)
def test_compiled_in_one_graph(places: list[int]) -> None:
    """Forward, loss and backward are traced without a break and agree with eager."""
    model = build(replace(TWO, encoder_layers=2))
    outputs, loss = step(model, places)
    want = gradients(model)
    model.zero_grad(set_to_none=True)
    spectrogram, plans = batch(places, model)

    def traced(mean: Tensor, scale: Tensor) -> Prediction:
        return model(spectrogram, plans, mean, scale, None)

    torch.compiler.reset()
    output = torch.compile(traced, backend="aot_eager", fullgraph=True)(MEAN, SCALE)
    again = total(OBJECTIVE.terms(output, spectrogram, plans, MEAN, SCALE), COUNTS)
    again.backward()
    assert float(again.detach()) == pytest.approx(float(loss), rel=1e-10)
    assert torch.allclose(
        output.pred_class[: len(outputs["pred_class/0"])], outputs["pred_class/0"], rtol=0, atol=1e-10
    )
    same(gradients(model), want)


@pytest.mark.parametrize("lengths", [(2, 10), (1, 10, 2), (2,), (1,)])
def test_empty_and_one_token_clips(lengths: tuple[int, ...]) -> None:
    """A clip of one token is visible and predicts nothing, a clip of none is nothing: also a whole batch."""
    grid = replace(GRIDS["frame"], partial="drop")
    model = build(TWO, grid)
    frames = torch.randn(sum(lengths), 8, dtype=torch.float64)
    cu = cumulative(lengths, torch.int64, "cpu")
    spectrogram = Spectrogram(frames, lengths, cu, torch.arange(len(lengths)))
    layout = grid.layout(spectrogram)
    plan = plan_from_ids(layout, [list(range(visible_count(n, 0.75))) for n in layout.lengths])
    output = model(spectrogram, (plan, plan), MEAN, SCALE, None)
    assert output.pred_recon.shape == output.pred_class.shape == (sum(plan.n_masked), 16)
    assert all(torch.isfinite(x).all() for x in output)
    terms = OBJECTIVE.terms(output, spectrogram, (plan, plan), MEAN, SCALE)
    loss = total(terms, OBJECTIVE.counts((plan, plan), grid))
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_autocast_keeps_rows_in_float32() -> None:
    """Under bf16 autocast the result is near that of float32 and the encoder hands on float32."""
    model = build().float()
    spectrogram, plans = batch([0, 1, 2], model)
    spectrogram = replace(spectrogram, frames=spectrogram.frames.float())
    exact = model(spectrogram, plans, MEAN.float(), SCALE.float(), None)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(spectrogram, plans, MEAN.float(), SCALE.float(), None)
    assert output.encoder_out.dtype == torch.float32
    assert float((output.encoder_out - exact.encoder_out).detach().abs().max()) < 0.15


@pytest.mark.parametrize("config", [TWO, ONE], ids=["two passes", "one pass"])
@pytest.mark.parametrize("places", [[0, 3], [0, 1, 2]], ids=["equal", "ragged"])
def test_flops(monkeypatch: pytest.MonkeyPatch, config: SsastConfig, places: list[int]) -> None:
    """Exactly what torch counts, attention by its explicit definition."""
    monkeypatch.setenv("MASKTRAIN_KERNELS", "reference")
    model = build(config)
    spectrogram, plans = batch(places, model)
    with FlopCounterMode(display=False) as counter:
        output = model(spectrogram, plans, MEAN, SCALE, None)
        torch.autograd.backward(list(output[1:]), [torch.ones_like(x) for x in output[1:]])
    assert model.train_flops(plans) == counter.get_total_flops()


@pytest.mark.parametrize("passes", [1, 2])
def test_bytes_kept_for_backward(monkeypatch: pytest.MonkeyPatch, passes: int) -> None:
    """Within 5 % of what autograd really keeps, parameters and the spectrogram aside."""
    monkeypatch.delenv("MASKTRAIN_KERNELS", raising=False)
    grid = TokenGrid(freq=8, patch_freq=16, patch_time=16, order="freq")
    config = SsastConfig(encoder_layers=4, embed_dim=96, ffn_dim=384, heads=3, passes=passes, columns=32)
    model = Ssast(config, grid, NORM)
    lengths = (320, 320)
    cu = cumulative(lengths, torch.int64, "cpu")
    spectrogram = Spectrogram(torch.randn(640, 128), lengths, cu, torch.arange(2))
    plans = tuple(draw(spectrogram, grid, i) for i in range(passes))
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
        output = model(spectrogram, plans, mean, scale, None)
        terms = OBJECTIVE.terms(output, spectrogram, plans, mean, scale)
        total(terms, OBJECTIVE.counts(plans, grid))
    assert model.activation_bytes(160, 2, 0.6) == pytest.approx(sum(kept.values()), rel=0.05)


def test_longer_clips_are_refused() -> None:
    model = build(replace(TWO, columns=9))
    model.check_columns(9)
    with pytest.raises(ConfigError, match=r"after 9 time columns.*up to 10 of 3 frames.*model.columns to 10"):
        model.check_columns(10)
    spectrogram, plans = batch([1, 0], model)
    with pytest.raises(ConfigError, match="up to 10"):
        model(spectrogram, plans, MEAN, SCALE, None)


def test_wrong_plans_are_refused() -> None:
    model = build()
    spectrogram, plans = batch([0], model)
    with pytest.raises(ValueError, match="needs 2 plans a clip, received 1"):
        model(spectrogram, plans[:1], MEAN, SCALE, None)
    other = draw(spectrogram, GRIDS["patch time-major"], 0)
    with pytest.raises(ValueError, match="the plan was made for"):
        model(spectrogram, (plans[0], other), MEAN, SCALE, None)


def test_weights_of_the_reference() -> None:
    """There and back with statistics of the input among ours; names and token orders that do not fit are named."""
    grid = GRIDS["patch"]
    model = Ssast(TWO, grid, InputNormConfig(kind="batch"))
    state = export_state(model.state_dict(), grid)
    back = import_state(state, model.state_dict(), grid)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[n], t) for n, t in model.state_dict().items())
    del state["cpredlayer.0.weight"]
    state["surprise"] = torch.zeros(1)
    state["v.pos_embed"] = torch.zeros(1, 3, 16)
    with pytest.raises(CheckpointError) as error:
        import_state(state, model.state_dict(), grid)
    for words in (
        "3 of the names",
        "missing cpredlayer.0.weight",
        "unknown surprise",
        "v.pos_embed: shape (1, 3, 16)",
    ):
        assert words in str(error.value)
    with pytest.raises(CheckpointError, match=r"frequency-major; received tokens\.order 'time'"):
        import_state(state, model.state_dict(), GRIDS["patch time-major"])


def test_registry() -> None:
    assert isinstance(registry.build(TWO, GRIDS["patch"], NORM), Ssast)
    assert (TWO.masks, ONE.masks) == (2, 1) and not TWO.may_drop_layers


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"embed_dim": 100, "heads": 12},
            "embed_dim: must be a multiple of model.heads; received 100 and 12",
        ),
        ({"encoder_layers": 0}, "encoder_layers: must be at least 1; received 0"),
        ({"encoder_layers": 512}, "encoder_layers: must be below 512; received 512"),
        ({"columns": 0}, "columns: must be at least 1; received 0"),
        ({"passes": 3}, "passes: must be 1 or 2; received 3"),
    ],
)
def test_bad_config(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SsastConfig(**change)
