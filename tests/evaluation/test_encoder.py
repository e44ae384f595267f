# SPDX-License-Identifier: Apache-2.0
"""The frozen encoder: its tokens, windows, frames and fingerprint, and the log-mel statistics beside it."""

from __future__ import annotations

import random
from pathlib import Path

import encoders
import pytest
import torch

from masktrain.errors import CheckpointError, ConfigError, DataError
from masktrain.evaluation.encoder import (
    FrozenEncoder,
    LogMelBaseline,
    _window_frames,
    load_encoder,
    untrained_encoder,
)
from masktrain.frontend.frontend import Frontend
from masktrain.masking.strategies import RandomMasking
from masktrain.types import StepKey, TokenGrid

SECONDS = (0.4, 1.3, 0.9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {name: encoders.save(root / name, name) for name in encoders.RECIPES}


@pytest.mark.parametrize("name", encoders.RECIPES)
def test_frames_are_the_tokens_column_by_column(saved: dict[str, Path], name: str) -> None:
    encoder = load_encoder(saved[name], "cpu")
    audio = encoders.batch(SECONDS)
    grid, freq = encoder.grid, encoder.grid.freq
    layout = encoder.layout(audio)
    layers = (1, encoder.n_layers)
    tokens, frames = encoder.embed(audio, layers), encoder.frames(audio, layers)
    assert frames.columns == layout.columns and all(c > 0 for c in layout.columns)
    assert tokens[1].leading.shape[::2] == (len(SECONDS), encoder.width)
    for layer in layers:
        assert tokens[layer].tokens.dtype == torch.float32 and not tokens[layer].tokens.requires_grad
        row = start = 0
        for columns, count in zip(layout.columns, layout.lengths, strict=True):
            for column in range(columns):
                ids = [
                    start + (column * freq + f if grid.order == "time" else f * columns + column)
                    for f in range(freq)
                ]
                expected = torch.cat([tokens[layer].tokens[i] for i in ids])
                assert torch.equal(frames.values[layer][row], expected)
                row += 1
            start += count
    mean = encoder.frames(audio, (2,), "mean").values[2]
    assert torch.allclose(mean, frames.values[2].unflatten(1, (freq, -1)).mean(1), atol=1e-6)


@pytest.mark.parametrize("name", encoders.RECIPES)
def test_a_clip_does_not_depend_on_those_beside_it(saved: dict[str, Path], name: str) -> None:
    encoder = load_encoder(saved[name], "cpu")
    together = encoder.pooled(encoders.batch(SECONDS), (1, 2))
    assert together.shape == (2, len(SECONDS), encoder.width * encoder.grid.freq)
    for i, seconds in enumerate(SECONDS):
        alone = encoder.pooled(encoders.batch((seconds,), seed=i), (1, 2))
        assert torch.allclose(alone[:, 0], together[:, i], atol=2e-5)


def test_training_mode_drops_nothing(saved: dict[str, Path]) -> None:
    encoder = load_encoder(saved["mae_ast_patch"], "cpu")
    audio = encoders.batch(SECONDS)
    expected, before = encoder.pooled(audio, (2,)), torch.get_rng_state()
    encoder.model.train()
    assert torch.equal(encoder.pooled(audio, (2,)), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_windows_are_few_whole_and_even() -> None:
    draw = random.Random(3)
    for _ in range(500):
        patch, most = draw.randint(1, 20), draw.choice((1, 2, 7, 40))
        grid = TokenGrid(
            freq=1, patch_freq=4, patch_time=patch, order="time", partial=draw.choice(("half", "drop"))
        )
        frames = draw.randint(patch, 1000)
        windows = _window_frames(frames, grid, most)
        columns = [grid.columns(n) for n in windows]
        assert sum(windows) == frames and sum(columns) == grid.columns(frames)
        assert all(n % patch == 0 for n in windows[:-1])
        assert max(columns) <= most and max(columns) - min(columns) <= 1
        assert len(windows) == -(-grid.columns(frames) // most)
        assert _window_frames(frames, grid, None) == [frames]


def test_a_long_clip_is_encoded_in_windows(tmp_path: Path) -> None:
    # 48 frames are 3 columns: 1.3 s have 8, so three windows of 2, 3 and 3
    encoder = load_encoder(encoders.save(tmp_path, "msm_mae", target_length=48), "cpu")
    assert encoder.max_columns == 3
    audio = encoders.batch((1.3, 0.3))
    spectrogram, counts = encoder.windows(encoder.spectrogram(audio))
    assert counts == (3, 1) and encoder.layout(audio).columns == (2, 3, 3, 2)
    assert spectrogram.clip_ids.tolist() == [0, 0, 0, 1]
    frames = encoder.frames(audio, (2,))
    assert frames.columns == (8, 2)
    start = 0
    for i, n in enumerate(encoder.layout(audio).columns):
        part = spectrogram.clip(i)
        alone = type(spectrogram)(
            part, (len(part),), torch.tensor([0, len(part)]), spectrogram.clip_ids[i : i + 1]
        )
        tokens = encoder.encode(alone, (2,))[2].tokens.unflatten(0, (5, n)).transpose(0, 1).flatten(1)
        assert torch.allclose(frames.values[2][start : start + n], tokens, atol=2e-5)
        start += n


def test_groups_of_windows_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(encoders.save(tmp_path, "mae_ast_patch", target_length=32), "cpu")
    audio = encoders.batch((1.3, 0.3, 0.8))
    whole = encoder.pooled(audio, (1, 2))
    monkeypatch.setattr("masktrain.evaluation.encoder.WINDOWS_AT_ONCE", 2)
    assert torch.allclose(encoder.pooled(audio, (1, 2)), whole, atol=2e-5)


def test_masking_at_inference(saved: dict[str, Path]) -> None:
    encoder = load_encoder(saved["maskspec"], "cpu")
    audio = encoders.batch(SECONDS)
    strategy, key = RandomMasking(mask_ratio=0.5), StepKey.make(1, 2, "cpu")
    plan = strategy.plan(encoder.layout(audio), key)
    found = encoder.embed(audio, (2,), lambda layout: strategy.plan(layout, key))[2].tokens
    everything = encoder.embed(audio, (2,))[2].tokens
    assert len(found) == sum(plan.n_visible) < len(everything)
    assert not torch.allclose(found, everything.index_select(0, plan.visible), atol=1e-3)


def test_untrained_differs_in_weights_only(saved: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    for name in ("maskspec", "mae_ast_frame"):
        trained = load_encoder(saved[name], "cpu")
        fresh, again, other = (untrained_encoder(saved[name], "cpu", seed) for seed in (7, 7, 8))
        own, kept = fresh.model.state_dict(), trained.model.state_dict()
        for key, tensor in own.items():
            if key.startswith("input_norm."):
                assert torch.equal(tensor, kept[key])
        weight = next(k for k in own if k.endswith("qkv.weight") or "attention" in k or "q_proj" in k)
        assert not torch.equal(own[weight], kept[weight])
        prints = [e.fingerprint for e in (trained, fresh, again, other)]
        assert prints[1] == prints[2] and len(set(prints)) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_fingerprint_knows_weights_and_front_end(saved: dict[str, Path], tmp_path: Path) -> None:
    first = load_encoder(saved["msm_mae"], "cpu")
    changed = load_encoder(saved["msm_mae"], "cpu")
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[0].add_(1e-6)
    window = load_encoder(encoders.save(tmp_path, "msm_mae", target_length=48), "cpu")
    again = load_encoder(saved["msm_mae"] / "checkpoints" / "step_00000005", "cpu")
    assert first.fingerprint == again.fingerprint and first.step == 5
    assert len({e.fingerprint for e in (first, changed, window)}) == 3


def test_centres_of_frames(saved: dict[str, Path]) -> None:
    # an impulse in the middle of a column, by the times given, moves that column most
    for name in ("msm_mae", "mae_ast_patch"):
        encoder = load_encoder(saved[name], "cpu")
        rate, patch = encoder.sample_rate, encoder.grid.patch_time
        centres = encoder.centres_ms(8)
        assert torch.allclose(centres.diff(), torch.full((7,), 160.0, dtype=torch.float64))
        for column in (1, 5):
            audio = encoders.batch((1.4,))
            audio.samples.zero_()
            audio.samples[round(float(centres[column]) * rate / 1000)] = 1
            frames = Frontend(encoder.frontend)(audio).frames
            energy = frames[: 8 * patch].unflatten(0, (8, patch)).exp().sum((1, 2))
            assert int(energy.argmax()) == column


def test_log_mel_statistics(saved: dict[str, Path]) -> None:
    encoder = load_encoder(saved["audiomae"], "cpu")
    baseline = LogMelBaseline(encoder.frontend, "cpu")
    audio = encoders.batch(SECONDS)
    found = baseline.pooled(audio, (1,))
    assert found.shape == (1, 3, 256) and found.dtype == torch.float32
    spectrogram = encoder.spectrogram(audio)
    for i in range(3):
        frames = spectrogram.clip(i).double().numpy()
        assert abs(found[0, i, :128].numpy() - frames.mean(0)).max() < 1e-5
        assert abs(found[0, i, 128:].numpy() - frames.std(0)).max() < 1e-5
    with pytest.raises(ConfigError, match="layer 1"):
        baseline.pooled(audio, (2,))


def test_what_cannot_be_embedded(saved: dict[str, Path], tmp_path: Path) -> None:
    encoder: FrozenEncoder = load_encoder(saved["mae_ast_patch"], "cpu")
    with pytest.raises(ConfigError, match=r"1 to 2; received 0, 3"):
        encoder.embed(encoders.batch((0.5,)), (0, 1, 3))
    with pytest.raises(DataError, match=r"clip 1: 0\.050 s .* at least 0\.175 s"):
        encoder.embed(encoders.batch((0.5, 0.05)), (1,))
    with pytest.raises(CheckpointError, match="no such folder"):
        load_encoder(tmp_path / "absent", "cpu")
