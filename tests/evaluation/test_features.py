# SPDX-License-Identifier: Apache-2.0
"""Features of labelled clips: units, batches, cache."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import encoders
import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from masktrain.errors import DataError
from masktrain.evaluation.encoder import LogMelBaseline, load_encoder
from masktrain.evaluation.features import clip_features, token_features, unit_crops
from masktrain.evaluation.labels import LabelledSet, read_labelled
from masktrain.frontend.presets import preset
from masktrain.types import AudioBatch

SECONDS = (0.5, 0.9, 0.3, 1.2, 0.7, 1.1)
SPLITS = ("train", "train", "train", "valid", "test", "test")


class Spy(LogMelBaseline):
    """The log-mel statistics, with what they were asked for."""

    n_layers = 1

    def __init__(self) -> None:
        super().__init__(preset("mae_ast"), "cpu")
        self.seen: list[AudioBatch] = []

    def pooled(self, audio: AudioBatch, layers: Sequence[int]) -> Tensor:
        self.seen.append(audio)
        return super().pooled(audio, layers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encoders.write_tones(tmp_path, [f"{n}.wav" for n in range(6)], SECONDS)
    return tmp_path


def labelled(folder: Path, unit: float | None = None, rule: str = "split") -> LabelledSet:
    places = SPLITS if rule == "split" else (1, 2, 3, 1, 2, 3)
    rows = [(f"{n}.wav", "ab"[n % 2], places[n]) for n in range(6)]
    found = read_labelled(encoders.write_manifest(folder, rows, f"path,label,{rule}"))
    return replace(found, unit_seconds=unit)


def test_batches_change_nothing(folder: Path) -> None:
    encoder = load_encoder(encoders.save(folder / "run", "mae_ast_patch"), "cpu")
    own = labelled(folder)
    done: list[tuple[int, int]] = []
    whole = clip_features(
        encoder, own, layers=(2, 1), batch_size=6, progress=lambda *place: done.append(place)
    )
    assert done == [(6, 6)] and whole.shape == (2, 6, 8 * encoder.width) and whole.dtype == torch.float32
    for size in (1, 4):
        assert torch.allclose(clip_features(encoder, own, layers=(2, 1), batch_size=size), whole, atol=2e-5)
    for row in range(6):
        samples, _ = soundfile.read(folder / f"{row}.wav", dtype="float32")
        alone = replace(encoders.batch((0.1,)), samples=torch.from_numpy(samples), lengths=(len(samples),))
        assert torch.allclose(encoder.pooled(alone, (2, 1))[:, 0], whole[:, row], atol=2e-5)


def test_units(folder: Path) -> None:
    spy, own = Spy(), labelled(folder, unit=0.6)
    clip_features(spy, own, layers=(1,))
    (batch,) = spy.seen
    assert batch.lengths == (9600,) * 6
    starts = []
    for row, samples in enumerate(batch.samples.split(9600)):
        source, _ = soundfile.read(folder / f"{row}.wav", dtype="float32")
        if len(source) <= 9600:
            assert np.array_equal(samples[: len(source)].numpy(), source) and not samples[len(source) :].any()
            continue
        places = [s for s in range(len(source) - 9599) if source[s] == samples[0]]
        start = next(s for s in places if np.array_equal(source[s : s + 9600], samples.numpy()))
        starts.append((row, start))
    # those that test are cut from their start, the others somewhere
    assert [row for row, _ in starts] == [1, 3, 4, 5]
    assert [start > 0 for _, start in starts] == [True, True, False, False]
    assert [(c.start, c.length) for c in unit_crops(own)] == [(c.start, c.length) for c in unit_crops(own)]
    # in cross validation every clip tests once
    assert all(crop.start == 0 for crop in unit_crops(labelled(folder, unit=0.6, rule="fold")))


def test_the_cache_answers_for_the_same_only(folder: Path) -> None:
    spy, cache = Spy(), folder / "cache"
    own = labelled(folder)

    def computed(encoder: Spy, labelled_set: LabelledSet) -> bool:
        encoder.seen.clear()
        found = clip_features(encoder, labelled_set, layers=(1,), cache=cache)
        fresh = bool(encoder.seen)
        assert torch.equal(found, clip_features(encoder, labelled_set, layers=(1,)))
        return fresh

    assert computed(spy, own) and not computed(spy, own)
    assert not computed(spy, labelled(folder))
    assert computed(spy, labelled(folder, unit=0.4))
    other = Spy()
    other.fingerprint = "0" * 64
    assert computed(other, own)
    # another sound of the same length in the same place
    soundfile.write(folder / "2.wav", encoders.tone(SECONDS[2], 16000, 99), 16000)
    os.utime(folder / "2.wav", ns=(1, 1))
    assert computed(spy, own) and not computed(spy, own)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert computed(spy, own) and not computed(spy, own)
    assert not list(cache.glob(".*"))


def test_layers_are_cached_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(encoders.save(folder / "run", "mae_ast_frame"), "cpu")
    own, cache = labelled(folder), folder / "cache"
    whole = clip_features(encoder, own, layers=(1, 2))
    assert torch.equal(clip_features(encoder, own, layers=(2,), cache=cache), whole[1:])
    assert torch.allclose(clip_features(encoder, own, layers=(1, 2), cache=cache), whole, atol=2e-5)
    monkeypatch.setattr(type(encoder), "pooled", lambda *_: pytest.fail("computed again"))
    again = clip_features(encoder, own, layers=(2, 1, 2), cache=cache)
    assert torch.equal(again[0], whole[1]) and torch.equal(again[0], again[2])


@pytest.mark.parametrize("name", ("msm_mae", "mae_ast_patch"))
def test_tokens_have_the_mean_of_the_features(folder: Path, name: str) -> None:
    encoder = load_encoder(encoders.save(folder / "run", name, target_length=48), "cpu")
    own, cache = labelled(folder), folder / "cache"
    tokens, cu = token_features(encoder, own, layer=2, cache=cache, batch_size=4)
    assert cu[0] == 0 and cu[-1] == len(tokens) and len(cu) == 7
    encoder.pool = "mean"
    means = torch.stack([clip.mean(0) for clip in tokens.split(cu.diff().tolist())])
    assert torch.allclose(means, clip_features(encoder, own, layers=(2,))[0], atol=2e-5)
    encoder.pool = "concat"
    again = token_features(encoder, own, layer=2, cache=cache)
    assert torch.equal(again[0], tokens) and torch.equal(again[1], cu)


def test_clips_shorter_than_a_patch_are_filled_and_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoders.write_tones(folder, ["2.wav"], 0.05)
    encoder = load_encoder(encoders.save(folder / "run", "mae_ast_patch"), "cpu")
    found = clip_features(encoder, labelled(folder), layers=(1,))[0, 2]
    assert "1 of 6 clips are shorter than a patch" in caplog.text and "2.wav" in caplog.text
    assert "0.050 s of 0.175 s" in caplog.text
    samples, _ = soundfile.read(folder / "2.wav", dtype="float32")
    padded = replace(
        encoders.batch((0.175,)), samples=torch.from_numpy(np.pad(samples, (0, 2800 - len(samples))))
    )
    assert torch.allclose(encoder.pooled(padded, (1,))[0, 0], found, atol=2e-5)
    caplog.clear()
    clip_features(encoder, labelled(folder, unit=0.2), layers=(1,))
    assert not caplog.text


def test_a_clip_that_breaks_while_it_is_read(folder: Path) -> None:
    own = labelled(folder)
    samples = np.full(8000, np.nan, dtype=np.float32)
    soundfile.write(folder / "0.wav", samples, 16000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"0\.wav .*line 2.*NaN"):
        clip_features(Spy(), own, layers=(1,))


def test_real_digits_keep_their_features_apart(data_dir: Path, tmp_path: Path) -> None:
    """The nearest neighbour by log-mel statistics tells most digits: rows, labels and splits belong together."""
    header, *rows = (data_dir / "fsdd.csv").read_text().splitlines()
    some = [row for row in rows if ",george," in row]
    path = tmp_path / "george.csv"
    path.write_text("\n".join([header, *(f"{data_dir}/{row}" for row in some)]) + "\n")
    own = read_labelled(path)
    features = clip_features(Spy(), own, layers=(1,), batch_size=64)[0]
    (split,) = own.splits
    labels = torch.from_numpy(own.labels)
    train, test = torch.from_numpy(split.train), torch.from_numpy(split.test)
    # 8 kHz audio leaves the upper bins at the floor, without any deviation
    x = (features - features[train].mean(0)) / features[train].std(0).clamp(min=1e-3)
    nearest = torch.cdist(x[test], x[train]).argmin(1)
    accuracy = (labels[train][nearest] == labels[test]).double().mean()
    assert len(own.manifest) == 500 and accuracy > 0.9
