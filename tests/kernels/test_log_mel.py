# SPDX-License-Identifier: Apache-2.0
"""log_mel against a frame-by-frame float64 computation in numpy, and the properties it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from masktrain.kernels.log_mel import MelSpec, log_mel, reference, spec_problem
from masktrain.kernels.log_mel.filters import mel_filters, window

KALDI = MelSpec(
    sample_rate=16_000,
    n_fft=512,
    win_length=400,
    hop=160,
    window="povey",
    framing="snip",
    remove_mean=True,
    remove_dc=True,
    frame_preemphasis=0.97,
    mel="kaldi",
    n_mels=128,
    fmin=20.0,
    fmax=8000.0,
    log="max",
    eps=2.0**-23,
)
CENTRED = MelSpec(
    sample_rate=16_000,
    n_fft=400,
    win_length=400,
    hop=160,
    window="hann_periodic",
    framing="centre",
    mel="slaney",
    n_mels=80,
    fmin=50.0,
    fmax=8000.0,
    log="add",
    eps=2.0**-23,
)
EMPHASISED = MelSpec(
    sample_rate=32_000,
    n_fft=1024,
    win_length=800,
    hop=320,
    window="hann",
    framing="centre",
    wave_preemphasis=0.97,
    mel="kaldi",
    n_mels=128,
    fmin=0.0,
    fmax=15_000.0,
    log="add",
    eps=1e-5,
    offset=4.5,
    divisor=5.0,
)
SPECS = {
    "kaldi": KALDI,
    "kaldi_scaled": replace(KALDI, wave_scale=2.0**15, window="hann", remove_mean=False),
    "centred": CENTRED,
    "emphasised": EMPHASISED,
    "odd": replace(
        CENTRED, window="hamming", win_length=333, n_fft=500, hop=77, mel="htk", power=1.0, fmin=0.0
    ),
    "mean_only": replace(KALDI, remove_dc=False, frame_preemphasis=0.5, n_mels=23),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def mel_matrix(spec: MelSpec) -> NDArray[np.float64]:
    """The filters, one weight at a time from their definition."""

    def htk(f: float) -> float:
        return 2595 * math.log10(1 + f / 700)

    def slaney(f: float) -> float:
        return f / (200 / 3) if f < 1000 else 15 + 27 * math.log(f / 1000) / math.log(6.4)

    scale = slaney if spec.mel == "slaney" else htk

    def inverse(mel: float) -> float:
        low, high = 0.0, float(spec.sample_rate)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if scale(middle) < mel else (low, middle)
        return low

    low, high = scale(spec.fmin), scale(spec.fmax)
    edges = [low + (high - low) * i / (spec.n_mels + 1) for i in range(spec.n_mels + 2)]
    if spec.mel != "kaldi":
        edges = [inverse(e) for e in edges]
    out = np.zeros((spec.n_mels, spec.n_fft // 2 + 1))
    for m in range(spec.n_mels):
        left, centre, right = edges[m : m + 3]
        for k in range(spec.n_fft // 2 + (spec.mel != "kaldi")):
            f = k * spec.sample_rate / spec.n_fft
            x = scale(f) if spec.mel == "kaldi" else f
            if left < x < right:
                out[m, k] = (x - left) / (centre - left) if x <= centre else (right - x) / (right - centre)
        if spec.mel == "slaney":
            out[m] *= 2 / (right - left)
    return out


def truth(wave: NDArray[np.float64], spec: MelSpec) -> NDArray[np.float64]:
    """Log-mel of one clip, frame by frame, as its definition reads."""
    x = wave * spec.wave_scale
    if spec.remove_mean:
        x = x - x.mean()
    if spec.wave_preemphasis:
        x = np.array([x[i + 1] - spec.wave_preemphasis * x[i] for i in range(len(x) - 1)])
    size = spec.n_fft if spec.framing == "centre" else spec.win_length
    if spec.framing == "centre" and len(x):
        x = np.pad(x, spec.n_fft // 2, mode="reflect")
    n = np.arange(spec.win_length)
    last = spec.win_length - 1
    taper = {
        "hann": 0.5 - 0.5 * np.cos(2 * np.pi * n / last),
        "hann_periodic": 0.5 - 0.5 * np.cos(2 * np.pi * n / spec.win_length),
        "hamming": 0.54 - 0.46 * np.cos(2 * np.pi * n / last),
        "povey": (0.5 - 0.5 * np.cos(2 * np.pi * n / last)) ** 0.85,
    }[spec.window]
    skip = (size - spec.win_length) // 2
    filters = mel_matrix(spec)
    rows = []
    for start in range(0, len(x) - size + 1, spec.hop):
        frame = x[start + skip : start + skip + spec.win_length]
        if spec.remove_dc:
            frame = frame - frame.mean()
        if spec.frame_preemphasis:
            frame = frame - spec.frame_preemphasis * np.concatenate([frame[:1], frame[:-1]])
        mel = filters @ (np.abs(np.fft.rfft(frame * taper, spec.n_fft)) ** spec.power)
        logs = np.log(np.maximum(mel, spec.eps)) if spec.log == "max" else np.log(mel + spec.eps)
        rows.append((logs + spec.offset) / spec.divisor)
    return np.array(rows).reshape(-1, spec.n_mels)


def wave(n: int, seed: int = 0) -> torch.Tensor:
    """Noise with a bump of low tones and an offset: loud and quiet bins side by side."""
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(n, dtype=torch.float64) / 16_000
    tone = 0.5 * torch.sin(2 * math.pi * 187.0 * t) + 0.1 * torch.sin(2 * math.pi * 1234.5 * t)
    return 0.03 + tone + 0.003 * torch.randn(n, generator=g, dtype=torch.float64)


@each_spec
@pytest.mark.parametrize("n", [2500, 4801])
def test_agrees_with_the_definition(spec: MelSpec, n: int) -> None:
    x = wave(n)
    expected = torch.from_numpy(truth(x.numpy(), spec))
    out, lengths = log_mel(x, (n,), spec)
    assert lengths == (len(expected),) == (spec.frames(n),)
    torch.testing.assert_close(out, expected, atol=1e-8, rtol=0)
    low, _ = log_mel(x, (n,), spec, dtype=torch.float32)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, atol=2e-5, rtol=0)
    x32 = x.float()
    expected = torch.from_numpy(truth(x32.double().numpy(), spec))
    out, _ = log_mel(x32, (n,), spec)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)


@each_spec
def test_awkward_lengths(spec: MelSpec) -> None:
    win, hop = spec.win_length, spec.hop
    lengths = (
        0,
        1,
        2,
        3,
        hop - 1,
        hop,
        hop + 1,
        win - 1,
        win,
        win + 1,
        win + hop - 1,
        win + hop,
        win + hop + 1,
    )
    x = wave(sum(lengths))
    out, counts = log_mel(x, lengths, spec)
    assert counts == tuple(spec.frames(n) for n in lengths)
    for clip, frames in zip(x.split(lengths), out.split(counts), strict=True):
        expected = torch.from_numpy(truth(clip.numpy(), spec)) if len(clip) else frames[:0]
        torch.testing.assert_close(frames, expected, atol=1e-8, rtol=0)


@each_spec
def test_frames_and_samples_are_inverse(spec: MelSpec) -> None:
    for frames in (0, 1, 2, 3, 998):
        n = spec.samples(frames)
        assert spec.frames(n) >= frames
        assert n == 0 or spec.frames(n - 1) < frames
    assert KALDI.frames(160_000) == 998
    assert CENTRED.frames(160_000) == 1001
    assert EMPHASISED.frames(320_000) == 1000


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(SPECS)),
    st.lists(st.integers(0, 6000), min_size=1, max_size=6),
    st.integers(0, 2**31),
)
def test_packed_is_one_by_one(name: str, lengths: list[int], seed: int) -> None:
    spec = SPECS[name]
    x = wave(sum(lengths), seed).float()
    out, counts = log_mel(x, tuple(lengths), spec)
    alone = [log_mel(clip, (len(clip),), spec)[0] for clip in x.split(lengths)]
    assert counts == tuple(len(a) for a in alone)
    assert torch.equal(out, torch.cat(alone))


@each_spec
def test_neighbours_do_not_leak(spec: MelSpec) -> None:
    x, bad = wave(3000).float(), torch.full((2000,), math.nan)
    out, counts = log_mel(torch.cat([bad, x, bad]), (2000, 3000, 2000), spec)
    assert torch.equal(out.split(counts)[1], log_mel(x, (3000,), spec)[0])


@each_spec
def test_chunks_do_not_matter(spec: MelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (9000, 0, 300, 15_000)
    x = wave(sum(lengths)).float()
    whole, _ = log_mel(x, lengths, spec, implementation="reference")
    monkeypatch.setattr(reference, "CHUNK_FRAMES", {"cpu": 16})
    assert torch.equal(log_mel(x, lengths, spec, implementation="reference")[0], whole)


@each_spec
def test_nothing(spec: MelSpec) -> None:
    for lengths in ((), (0,), (0, 0)):
        out, counts = log_mel(torch.empty(0), lengths, spec)
        assert out.shape == (0, spec.n_mels)
        assert counts == (0,) * len(lengths)
    if spec.framing == "snip":
        out, counts = log_mel(torch.zeros(2 * spec.win_length - 2), (spec.win_length - 1,) * 2, spec)
        assert out.shape == (0, spec.n_mels)
        assert counts == (0, 0)


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digital_silence_lies_at_the_floor(spec: MelSpec, dtype: torch.dtype) -> None:
    out, _ = log_mel(torch.zeros(4000, dtype=dtype), (4000,), spec)
    floor = torch.full_like(out, (math.log(spec.eps) + spec.offset) / spec.divisor)
    assert len(out) > 0
    torch.testing.assert_close(out, floor, atol=2e-6, rtol=0)


def test_a_constant_is_silence_where_the_mean_is_removed() -> None:
    for spec in (KALDI, SPECS["kaldi_scaled"], SPECS["mean_only"]):
        out, _ = log_mel(torch.full((4000,), 0.123), (4000,), spec)
        torch.testing.assert_close(out, torch.full_like(out, math.log(spec.eps)), atol=2e-6, rtol=0)


def test_clip_mean_without_effect_under_frame_means() -> None:
    x = wave(5000)
    out, _ = log_mel(x - x.mean(), (5000,), replace(KALDI, remove_mean=False))
    torch.testing.assert_close(log_mel(x, (5000,), KALDI)[0], out, atol=1e-9, rtol=0)


def test_float32_on_real_clips(data_dir: Path) -> None:
    sf = pytest.importorskip("soundfile")
    paths = sorted(data_dir.glob("esc10/*/*.ogg"))[::40] + sorted(data_dir.glob("fsdd/**/*.wav"))[::300]
    assert len(paths) >= 15
    clips = [torch.from_numpy(sf.read(p, dtype="float32")[0]) for p in paths]
    x, lengths = torch.cat(clips), tuple(len(c) for c in clips)
    for spec in SPECS.values():
        low, _ = log_mel(x, lengths, spec)
        high, _ = log_mel(x.double(), lengths, spec)
        assert (low - high).abs().max() < 1e-4


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_products_do_not_reach_it(precision: str) -> None:
    x = wave(5000).float()
    expected, _ = log_mel(x, (5000,), KALDI)
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(log_mel(x, (5000,), KALDI)[0], expected)
    finally:
        torch.set_float32_matmul_precision("highest")


@each_spec
def test_filters_follow_their_definition(spec: MelSpec) -> None:
    np.testing.assert_allclose(mel_filters(spec).numpy(), mel_matrix(spec), atol=1e-10, rtol=0)


def test_kaldi_triangles_add_up_to_one() -> None:
    """Between the first and the last centre each frequency belongs to two triangles with weights that sum to
    1."""
    total = mel_filters(KALDI).sum(0)
    hz = torch.arange(257) * 16_000 / 512
    inside = (hz > 100) & (hz < 7800)
    torch.testing.assert_close(
        total[inside], torch.ones(int(inside.sum()), dtype=torch.float64), atol=1e-9, rtol=0
    )
    # 128 filters over 256 bins: one holds no bin, a known property
    assert (mel_filters(KALDI).sum(1) == 0).sum() == 1


def test_windows_are_those_of_torch() -> None:
    expected = {
        "hann": torch.hann_window(400, periodic=False, dtype=torch.float64),
        "hann_periodic": torch.hann_window(400, dtype=torch.float64),
        "hamming": torch.hamming_window(400, periodic=False, dtype=torch.float64),
        "povey": torch.hann_window(400, periodic=False, dtype=torch.float64) ** 0.85,
    }
    for name, values in expected.items():
        spec = replace(KALDI, window=name)  # type: ignore[arg-type]
        torch.testing.assert_close(window(spec), values, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"window": "boxcar"},
            "window: must be one of hann, hann_periodic, hamming, povey; received 'boxcar'",
        ),
        ({"framing": "same"}, "framing: must be one of snip, centre"),
        ({"mel": "bark"}, "mel: must be one of kaldi, htk, slaney"),
        ({"log": "db"}, "log: must be one of max, add"),
        ({"hop": 0}, "hop: must be at least 1; received 0"),
        ({"win_length": 1}, "win_length: must be at least 2"),
        ({"n_mels": 0}, "n_mels: must be at least 1"),
        ({"sample_rate": 0}, "sample_rate: must be at least 1"),
        ({"n_fft": 256}, r"n_fft: must be even and at least win_length \(400\); received 256"),
        ({"n_fft": 513}, "n_fft: must be even"),
        ({"fmax": 8001.0}, "fmin, fmax: must satisfy 0 <= fmin < fmax <= 8000 Hz"),
        ({"fmin": 8000.0}, "fmin, fmax: must satisfy"),
        ({"frame_preemphasis": 1.0}, r"frame_preemphasis: must lie in \[0, 1\)"),
        ({"wave_preemphasis": -0.1}, "wave_preemphasis"),
        ({"eps": 0.0}, "eps: must be greater than 0; received 0.0"),
        ({"wave_scale": math.nan}, "wave_scale: must be greater than 0; received nan"),
    ],
)
def test_wrong_specs_are_named(change: dict[str, object], message: str) -> None:
    spec = replace(KALDI, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_mel: spec." + message):
        log_mel(torch.zeros(1000), (1000,), spec)


def test_mistakes_are_named() -> None:
    assert all(spec_problem(s) is None for s in SPECS.values())
    x = torch.zeros(1000)
    with pytest.raises(TypeError, match="samples must be float32 or float64, received float16"):
        log_mel(x.half(), (1000,), KALDI)
    with pytest.raises(ValueError, match="lengths must add up to the 1000 samples, received 999"):
        log_mel(x, (999,), KALDI)
    with pytest.raises(TypeError, match="spec must be a MelSpec, received str"):
        log_mel(x, (1000,), "kaldi")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be float32 or float64, received torch\.bfloat16"):
        log_mel(x, (1000,), KALDI, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="samples is data and must not require a gradient"):
        log_mel(x.requires_grad_(), (1000,), KALDI)
