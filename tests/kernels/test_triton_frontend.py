# SPDX-License-Identifier: Apache-2.0
"""resample and log_mel in Triton, on a GPU or interpreted: as exact as their digits allow, on real recordings too."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from masktrain.frontend.presets import preset
from masktrain.kernels import _digits, _triton
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import assert_accurate, poisoned_memory
from masktrain.kernels.log_mel import MelSpec, log_mel
from masktrain.kernels.log_mel import _triton as log_mel_triton
from masktrain.kernels.resample import _triton as resample_triton
from masktrain.kernels.resample import resample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _triton.why_not(torch.zeros(0, device=DEVICE))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def noise(n: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def resampled(x: Tensor, *clips, implementation: str = "triton", **options) -> tuple[Tensor, tuple[int, ...]]:
    with poisoned_memory():
        return resample(x, *clips, implementation=implementation, **options)


def frames(x: Tensor, lengths: tuple[int, ...], spec: MelSpec, implementation: str = "triton") -> Tensor:
    dtype = torch.float64 if implementation == "reference" else torch.float32
    with poisoned_memory():
        return log_mel(x, lengths, spec, dtype=dtype, implementation=implementation)[0]


def test_digits_are_the_weights() -> None:
    weights = torch.randn(7, 5, dtype=torch.float64)
    weights[0, 0] = -3 * weights.abs().max()
    digits, unit = _digits.digits_of(weights)
    assert digits.dtype == torch.int8 and digits.shape == (4, 7, 5)
    places = torch.tensor([256.0**3, 256.0**2, 256.0, 1.0], dtype=torch.float64)
    value = (digits.double() * places[:, None, None]).sum(0) * unit
    assert (value - weights).abs().max() <= 0.5001 * unit
    assert unit < weights.abs().max() / 2**30.9


@pytest.mark.parametrize(
    ("rate", "target"),
    [(44_100, 16_000), (48_000, 16_000), (8_000, 16_000), (44_100, 32_000)],
)
def test_resampled_is_exact_to_the_digits(rate: int, target: int) -> None:
    n = 300 * rate // target
    x = noise(2 * n + 101)
    # nothing, one at the rate already, and one that is shorter than the filter
    clips = (n, 0, n, 100, 1), (rate, rate, target, rate, rate), target
    truth, lengths = resampled(x.double(), *clips, implementation="reference")
    out, out_lengths = resampled(x, *clips, dtype=torch.float64)
    assert out_lengths == lengths and out.dtype == torch.float64
    assert (out - truth).abs().max() <= 2.0**-28 * x.abs().max()
    assert torch.equal(resampled(x[:n], (n,), (rate,), target, dtype=torch.float64)[0], out[: lengths[0]])
    plain = resampled(x, *clips, implementation="reference")[0]
    assert torch.equal(resampled(x, *clips)[0], out.float())
    assert_accurate(out.float(), plain, truth)


def test_each_row_has_its_own_unit() -> None:
    """After a loud beginning what is quieter by 2^-20 is as exact as alone."""
    n, quiet = 2000, noise(2000)
    x = torch.cat([quiet[:1000], quiet[1000:] * 2.0**-20])
    out, truth = (
        resampled(x, (n,), (16_000,), 8_000, dtype=torch.float64, implementation=i)[0]
        for i in ("triton", "reference")
    )
    later = slice(1000 // 2 + 200, None)
    assert (out - truth)[later].abs().max() <= 2.0**-48 * x.abs().max()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_and_stays_in_its_clip(bad: float) -> None:
    x = noise(3000)
    x[:1000] = bad
    out, lengths = resampled(x, (1000, 2000), (48_000,) * 2, 16_000)
    first, second = out.split(lengths)
    assert first.isnan().all() and second.isfinite().all()
    x, spec = noise(1600), preset("m2d").mel
    x[800] = bad
    out = frames(torch.cat([noise(800), x]), (800, 1600), spec)
    touched = frames(x, (1600,), spec, "reference").isnan().all(1)
    before = len(out) - len(touched)
    assert touched.any() and not touched.all()
    assert torch.equal(out[before:].isnan().all(1), touched) and out[:before].isfinite().all()


PLAIN = replace(preset("m2d").mel, mel="htk", n_mels=23, log="max", eps=1e-10, wave_scale=2.0**15)
VARIANTS: dict[str, MelSpec] = {
    name: preset(name).mel for name in ("audiomae", "mae_ast", "m2d", "passt")
} | {
    "magnitude": replace(PLAIN, power=1.0, window="hamming", remove_dc=True),
    "other sizes": replace(PLAIN, win_length=334, n_fft=500, hop=77, offset=4.5, divisor=5.0),
}


@pytest.mark.parametrize("spec", VARIANTS.values(), ids=VARIANTS.keys())
def test_log_mel_is_exact_to_the_digits(spec: MelSpec) -> None:
    lengths = (1400, 0, 1, 90, 1000)
    x = noise(sum(lengths)) + 0.02
    time = torch.arange(1400, device=DEVICE) / spec.sample_rate
    x[:1400] = 0.9 * torch.sin(2 * math.pi * 187 * time) + 1e-4 * x[:1400]
    # the waveform of the front end is float64, that of others float32
    x = x.double() if spec.framing == "snip" else x
    truth = frames(x.double(), lengths, spec, "reference")
    out = frames(x, lengths, spec)
    assert out.dtype == torch.float32
    # far from the loud tone, where little more than its leakage is left
    assert (out - truth).abs().max() * spec.divisor < 3e-4
    after = spec.frames(1400) + spec.frames(1) + spec.frames(90)
    # a few roundings of float32 values
    assert (out - truth)[after:].abs().max() < 4 * 2**-23 * truth.abs().max()


def test_neither_batch_nor_chunk_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, x = preset("mae_ast").mel, noise(2400)
    out = frames(x, (1400, 1000), spec)
    monkeypatch.setattr(log_mel_triton, "CHUNK_FRAMES", 4)
    assert torch.equal(frames(x, (1400, 1000), spec), out)
    assert torch.equal(frames(x[1400:], (1000,), spec), out[spec.frames(1400) :])


def test_silence_is_the_floor() -> None:
    for name in ("audiomae", "m2d"):
        spec = preset(name).mel
        out = frames(torch.zeros(1000, device=DEVICE), (1000,), spec)
        torch.testing.assert_close(out, torch.full_like(out, math.log(spec.eps)), atol=1e-5, rtol=0)
        assert not len(frames(torch.zeros(0, device=DEVICE), (), spec))


def test_recordings_are_within_the_tolerance(data_dir: Path) -> None:
    within_the_tolerance(data_dir, "mae_ast", files=3, share=0.06)


@pytest.mark.slow(covers=["kernels/_digits.py", "kernels/log_mel", "kernels/resample", "masktrain/frontend"])
@pytest.mark.parametrize("name", ["mae_ast", "m2d", "passt"])
def test_more_recordings_are_within_the_tolerance(data_dir: Path, name: str) -> None:
    within_the_tolerance(data_dir, name, files=10, share=0.25)


def within_the_tolerance(data_dir: Path, name: str, files: int, share: float) -> None:
    """1e-3 in log units, everywhere: the way of the front end, from 44.1 kHz through a float64 waveform.

    files: how many, each also much quieter. share: seconds of each.
    """
    spec, pieces = preset(name).mel, []
    recordings = sorted((data_dir / "esc10").rglob("*.ogg"))
    for path in recordings[:: len(recordings) // files][:files]:
        x, rate = soundfile.read(path, dtype="float32", frames=round(44_100 * share))
        assert rate == 44_100
        pieces += [torch.from_numpy(x), torch.from_numpy(x) * 2e-4]
    lengths = tuple(map(len, pieces))
    clips = torch.cat(pieces).to(DEVICE), lengths, (44_100,) * len(lengths), spec.sample_rate
    found = []
    for implementation in ("triton", "reference"):
        wave, out_lengths = resampled(*clips, dtype=torch.float64, implementation=implementation)
        found.append(frames(wave, out_lengths, spec, implementation))
    assert len(found[0]) >= files
    assert (found[0] - found[1]).abs().max() * spec.divisor < 1e-3


def test_when_it_serves() -> None:
    x = torch.zeros(1000, device=DEVICE)
    assert _triton.unmeasured(x) is not None
    assert "not yet measured on a GPU" in str(_triton.unmeasured(x)) or _triton.INTERPRETED
    cases: list[tuple[str, dict]] = [
        ("even windows up to 4096 samples, not 333", {"win_length": 333}),
        ("has the powers 1 and 2, not 1.5", {"power": 1.5}),
        ("subtracts the mean of a frame", {"remove_mean": True}),
        ("at most 256 filters", {"n_mels": 257}),
        ("eps that is a normal float32", {"eps": 1e-40}),
    ]
    for reason, changes in cases:
        with pytest.raises(KernelUnavailable, match=f"triton was asked for and cannot serve: .*{reason}"):
            log_mel(x, (1000,), replace(PLAIN, **changes), dtype=torch.float32, implementation="triton")
    with pytest.raises(KernelUnavailable, match=r"gives float32, not torch\.float64"):
        log_mel(x, (1000,), PLAIN, dtype=torch.float64, implementation="triton")
    with pytest.raises(KernelUnavailable, match="takes float32, not float64"):
        resample(x.double(), (1000,), (8_000,), 16_000, implementation="triton")
    with pytest.raises(KernelUnavailable, match="44101 to 16000 Hz, in lowest terms 44101 to 16000, needs"):
        resample(x, (1000,), (44_101,), 16_000, implementation="triton")
    assert resample_triton.why_not(x, (44_100, 48_000, 11_025, 22_050, 96_000, 192_000), 32_000) is None


def test_torch_knows_the_ops() -> None:
    x = noise(1000)
    checks = ("test_schema", "test_faketensor")
    args = (x, (600, 400), (8_000, 16_000), 16_000, torch.float64)
    torch.library.opcheck(torch.ops.masktrain.resample_triton.default, args, test_utils=checks)
    spec = preset("m2d").mel
    tables = log_mel_triton.tables(spec, x.device)
    args = (
        x,
        (600, 400),
        (4, 3),
        *tables,
        400,
        160,
        200,
        True,
        False,
        0.0,
        0.0,
        False,
        False,
        1e-7,
        0.0,
        1.0,
        80,
    )
    torch.library.opcheck(torch.ops.masktrain.log_mel_triton.default, args, test_utils=checks)
