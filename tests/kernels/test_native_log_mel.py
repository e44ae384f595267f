# SPDX-License-Identifier: Apache-2.0
"""The native log_mel: as accurate as the reference in float32, and the same bits in every batch, thread count and
instruction set."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from masktrain.frontend.presets import PRESETS, preset
from masktrain.kernels import _native
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import check_op, poisoned_memory
from masktrain.kernels.log_mel import MelSpec, log_mel, reference
from masktrain.kernels.log_mel._native import log_mel as native
from masktrain.kernels.log_mel._native import tables

pytestmark = pytest.mark.skipif(_native.cpu() is None, reason="no native library")

PLAIN = MelSpec(
    sample_rate=16_000,
    n_fft=512,
    win_length=400,
    hop=160,
    window="hann",
    framing="snip",
    mel="htk",
    n_mels=40,
    fmin=0.0,
    fmax=8000.0,
    log="max",
    eps=1e-10,
)
# Presets of one spec share a row.
VARIANTS: dict[str, MelSpec] = {name: spec for spec, name in {preset(n).mel: n for n in PRESETS}.items()} | {
    "clip_mean": replace(PLAIN, remove_mean=True, frame_preemphasis=0.5),
    "clip_mean_emphasised": replace(PLAIN, remove_mean=True, wave_preemphasis=0.97, framing="centre"),
    "magnitude": replace(PLAIN, power=1.0, log="add", n_mels=23, wave_scale=2.0**15),
    "odd": replace(
        PLAIN, win_length=333, n_fft=500, hop=77, framing="centre", n_mels=17, offset=4.5, divisor=5.0
    ),
    "long_hop": replace(PLAIN, hop=1000, win_length=401, remove_dc=True),
}
each_variant = pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())


def wave(n: int, seed: int = 0) -> Tensor:
    """Loud low tones, a click and quiet noise, away from 0."""
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(n, dtype=torch.float64) / 16_000
    x = (
        0.03
        + 0.5 * torch.sin(2 * math.pi * 187.0 * t)
        + 1e-4 * torch.randn(n, generator=g, dtype=torch.float64)
    )
    x[n // 2 : n // 2 + 1] += 0.3
    return x.float()


def lengths_of(spec: MelSpec) -> tuple[int, ...]:
    """Empty clips, clips too short for a frame, of one frame, and around whole numbers of vectors of frames."""
    frames = [spec.samples(n) for n in (1, 2, 7, 8, 9, 17)]
    return (0, 1, *frames, 2, spec.win_length - 1, spec.samples(5) + spec.hop - 1, 0)


def frames_of(samples: Tensor, lengths: tuple[int, ...], spec: MelSpec, implementation: str) -> Tensor:
    return log_mel(samples, lengths, spec, implementation=implementation)[0]


@each_variant
def test_as_accurate_as_the_reference(spec: MelSpec, level: int) -> None:
    lengths = lengths_of(spec)
    check_op(
        lambda x: frames_of(x, lengths, spec, "native"),
        lambda x: frames_of(x, lengths, spec, "reference"),
        [wave(sum(lengths))],
    )


SIZES = [2, 4, 6, 8, 10, 12, 16, 18, 20, 24, 30, 32, 40, 48, 50, 54, 64, 90]
SIZES += [128, 162, 240, 250, 256, 800, 1024, 2048]


@pytest.mark.parametrize("n_fft", SIZES)
def test_every_way_to_factor_the_transform(n_fft: int, level: int) -> None:
    spec = replace(PLAIN, n_fft=n_fft, win_length=min(n_fft, 400), hop=max(1, n_fft // 3), n_mels=9, eps=1e-6)
    x = torch.randn(4000, generator=torch.Generator().manual_seed(n_fft))
    got, counts = log_mel(x, (4000,), spec, implementation="native")
    truth, want = log_mel(x.double(), (4000,), spec, implementation="reference")
    assert counts == want
    assert (got - truth).abs().max() < 5e-6


@each_variant
def test_every_instruction_set_gives_the_same_bits(spec: MelSpec, level: int) -> None:
    library, lengths = _native.require(), lengths_of(spec)
    x = wave(sum(lengths))
    with poisoned_memory():
        got = frames_of(x, lengths, spec, "native")
    library.mt_set_cpu_level(0)
    assert torch.equal(got, frames_of(x, lengths, spec, "native"))


@each_variant
def test_threads_do_not_matter(spec: MelSpec, threads: int) -> None:
    lengths = lengths_of(spec) * 3
    x = wave(sum(lengths))
    got = frames_of(x, lengths, spec, "native")
    torch.set_num_threads(1)
    assert torch.equal(got, frames_of(x, lengths, spec, "native"))


@each_variant
def test_a_clip_does_not_depend_on_its_batch(spec: MelSpec, level: int) -> None:
    lengths = lengths_of(spec)
    x = wave(sum(lengths))
    together = frames_of(x, lengths, spec, "native").split([spec.frames(n) for n in lengths])
    for clip, frames in zip(x.split(lengths), together, strict=True):
        assert torch.equal(frames_of(clip, (len(clip),), spec, "native"), frames)


@each_variant
def test_not_numbers_stay_in_their_frames(spec: MelSpec, level: int) -> None:
    lengths = (spec.samples(4), spec.samples(3), spec.samples(6))
    x = wave(sum(lengths))
    clean = frames_of(x, lengths, spec, "native").split([spec.frames(n) for n in lengths])
    bad = x.clone()
    bad[lengths[0] : lengths[0] + lengths[1]] = math.nan
    got = frames_of(bad, lengths, spec, "native").split([spec.frames(n) for n in lengths])
    assert torch.equal(got[0], clean[0]) and torch.equal(got[2], clean[2])
    # A filter that holds no bin sees nothing.
    assert torch.equal(got[1].isnan(), (tables(spec)[2][1] > 0).expand_as(got[1]))


@each_variant
def test_float64_waveforms(spec: MelSpec, level: int) -> None:
    lengths = lengths_of(spec)
    x = wave(sum(lengths)).double() + 1e-9
    got, _ = log_mel(x, lengths, spec, dtype=torch.float32, implementation="native")
    plain, _ = log_mel(x, lengths, spec, dtype=torch.float32, implementation="reference")
    truth, _ = log_mel(x, lengths, spec, implementation="reference")
    assert got.dtype == torch.float32
    assert (got - truth).abs().max() <= 2 * (plain - truth).abs().max() + 2e-6


def test_real_clips(data_dir: Path) -> None:
    sf = pytest.importorskip("soundfile")
    paths = sorted(data_dir.glob("esc10/*/*.ogg"))[::20] + sorted(data_dir.glob("fsdd/**/*.wav"))[::150]
    clips = [torch.from_numpy(sf.read(p, dtype="float32")[0]) for p in paths]
    assert len(clips) >= 30
    x, lengths = torch.cat(clips), tuple(len(c) for c in clips)
    for name, spec in VARIANTS.items():
        truth = frames_of(x.double(), lengths, spec, "reference")
        assert (frames_of(x, lengths, spec, "native") - truth).abs().max() < 1e-5, name


def test_nothing() -> None:
    for lengths in ((), (0,), (3, 0, 5)):
        out, counts = log_mel(torch.zeros(sum(lengths)), lengths, PLAIN, implementation="native")
        assert out.shape == (0, 40) and counts == (0,) * len(lengths)


def test_strided_samples() -> None:
    x = wave(8000)
    assert torch.equal(
        frames_of(x[::2], (4000,), PLAIN, "native"), frames_of(x[::2].contiguous(), (4000,), PLAIN, "native")
    )


def test_it_serves_float32_by_itself() -> None:
    x = wave(4000)
    assert torch.equal(log_mel(x, (4000,), PLAIN)[0], native(x, (4000,), PLAIN, dtype=torch.float32)[0])
    assert torch.equal(
        log_mel(x.double(), (4000,), PLAIN)[0],
        reference.log_mel(x.double(), (4000,), PLAIN, dtype=torch.float64)[0],
    )


@pytest.mark.parametrize(
    ("change", "dtype", "words"),
    [
        ({}, torch.float64, "gives float32, not torch.float64"),
        ({"power": 1.5}, torch.float32, "the powers 1 and 2, not 1.5"),
        ({"eps": 1e-42}, torch.float32, "eps that is a normal float32"),
        ({"n_fft": 406}, torch.float32, "transforms .* samples up to 16384, not 406"),
        ({"n_fft": 1 << 15}, torch.float32, "samples up to 16384, not 32768"),
    ],
)
def test_what_it_does_not_serve_is_named(change: dict, dtype: torch.dtype, words: str) -> None:
    spec = replace(PLAIN, **change)
    with pytest.raises(KernelUnavailable, match=words):
        log_mel(torch.zeros(1000), (1000,), spec, dtype=dtype, implementation="native")
    log_mel(torch.zeros(1000), (1000,), spec, dtype=dtype)


def test_opcheck() -> None:
    numbers = (160, 200, False, True, 0.0, 0.97, False, True, 1e-10, 0.0, 1.0)
    arguments = (wave(1000), (600, 400), (4, 3), *tables(PLAIN), *numbers)
    torch.library.opcheck(torch.ops.masktrain.log_mel.default, arguments)
