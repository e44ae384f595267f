# SPDX-License-Identifier: Apache-2.0
"""resample against exact band-limited signals, a long independent filter, and the properties it promises."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal
from torch import Tensor

from masktrain.kernels import _dispatch, _native
from masktrain.kernels.resample import reference, resample, resampled_length

PAIRS = [
    (44_100, 16_000),
    (48_000, 16_000),
    (8_000, 16_000),
    (192_000, 16_000),
    (22_050, 16_000),
    (11_025, 16_000),
    (96_000, 32_000),
    (44_100, 32_000),
    (16_000, 32_000),
    (1_000, 16_000),
    (16_000, 1_000),
    (1_000, 192_000),
    (44_101, 16_000),
]


@pytest.fixture(autouse=True, scope="module", params=["reference", "auto"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """The reference, and what serves unasked: native where its tables are small enough."""
    if request.param == "auto" and _native.cpu() is None:
        pytest.skip(f"{_native.why_not()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(_dispatch.ENV, request.param)
        yield


def one(samples: Tensor, rate: int, target: int, implementation: str | None = None) -> Tensor:
    return resample(samples, (len(samples),), (rate,), target, implementation=implementation)[0]


def tones(rate: int, seconds: float, frequencies: Sequence[float], count: int | None = None) -> Tensor:
    """The sum of unit sinusoids of fixed phases, sampled at `rate` from time 0."""
    time = torch.arange(count or round(seconds * rate), dtype=torch.float64) / rate
    return sum(
        (torch.sin(2 * math.pi * f * time + 0.7 * i) for i, f in enumerate(frequencies)),
        torch.zeros_like(time),
    )


def interior(out: Tensor, rate: int, target: int) -> slice:
    """The outputs whose filter lies inside the clip."""
    edge = math.ceil((reference.HALF_WIDTH + 1) * target / min(rate, target))
    return slice(edge, len(out) - edge)


@pytest.mark.parametrize(("rate", "target"), PAIRS)
def test_tones_in_the_pass_band_are_sampled_at_the_new_times(rate: int, target: int) -> None:
    nyquist = min(rate, target) / 2
    frequencies = [share * nyquist for share in (0.0031, 0.21, 0.5, 0.77, 0.9)]
    seconds = 1000 / min(rate, target)
    x = tones(rate, seconds, frequencies)
    out = one(x, rate, target)
    assert len(out) == math.ceil(len(x) * target / rate)
    truth = tones(target, 0, frequencies, len(out))
    part = interior(out, rate, target)
    assert part.stop - part.start > 100
    # 0.0002 dB of each of the five
    torch.testing.assert_close(out[part], truth[part], atol=5 * 2.5e-5, rtol=0)
    torch.testing.assert_close(one(x.float(), rate, target).double(), out, atol=1e-5, rtol=0)


def test_float64_results_of_float32_samples() -> None:
    x = torch.randn(3000)
    clips = (1000, 1500, 500), (44_100, 16_000, 8_000)
    out, _ = resample(x, *clips, 16_000, dtype=torch.float64)
    assert torch.equal(out, resample(x.double(), *clips, 16_000)[0])
    assert torch.equal(resample(x, (3000,), (8_000,), 8_000, dtype=torch.float64)[0], x.double())


@pytest.mark.parametrize(("rate", "target"), PAIRS[:9])
def test_noise_agrees_with_a_long_scipy_filter(rate: int, target: int) -> None:
    common = math.gcd(rate, target)
    up, down = target // common, rate // common
    low = min(rate, target)
    n = round(0.1 * rate)
    # white noise up to 0.85 of the lower Nyquist frequency, which both filters pass
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(n))
    spectrum[np.fft.rfftfreq(n, 1 / rate) > 0.85 * low / 2] = 0
    x = np.fft.irfft(spectrum, n)
    widest = max(up, down)
    taps = signal.firwin(2 * 600 * widest + 1, 0.95 / widest, window=("kaiser", 14.0))
    truth = torch.from_numpy(signal.resample_poly(x, up, down, window=taps))
    out = one(torch.from_numpy(x), rate, target)
    part = interior(out, rate, target)
    scale = truth.abs().max()
    # the ends differ: the long filter sees more of the silence around the clip
    middle = slice(part.start + len(out) // 4, part.stop - len(out) // 4)
    assert ((out - truth)[middle].abs().max() / scale) < 2e-3
    assert ((out - truth)[middle].square().mean().sqrt() / scale) < 2e-4


@pytest.mark.parametrize(
    ("rate", "target"), [(44_100, 16_000), (48_000, 16_000), (192_000, 16_000), (44_101, 16_000)]
)
def test_what_lies_above_the_new_nyquist_frequency_vanishes(rate: int, target: int) -> None:
    for frequency in np.linspace(target / 2, rate / 2, 23)[:-1]:
        out = one(tones(rate, 0.1, [frequency]), rate, target)
        level = 20 * math.log10(out[interior(out, rate, target)].abs().max().item())
        assert level < -98, f"{frequency:.0f} Hz: {level:.1f} dB"


@pytest.mark.parametrize(("rate", "target"), [(8_000, 16_000), (16_000, 44_100)])
def test_no_images_above_the_old_nyquist_frequency(rate: int, target: int) -> None:
    x = tones(rate, 1.0, [0.613 * rate / 2])
    out = one(x, rate, target)
    middle = out[len(out) // 4 : len(out) // 4 + target // 2] * torch.from_numpy(
        signal.windows.blackmanharris(target // 2)
    )
    spectrum = torch.fft.rfft(middle).abs()
    hz = torch.arange(len(spectrum)) * 2
    assert 20 * torch.log10(spectrum[hz > rate / 2].max() / spectrum.max()) < -90


@pytest.mark.parametrize(("rate", "target"), PAIRS)
def test_a_constant_stays_constant(rate: int, target: int) -> None:
    x = torch.full((math.ceil(400 * rate / min(rate, target)),), 0.37, dtype=torch.float64)
    out = one(x, rate, target)
    part = out[interior(out, rate, target)]
    assert len(part) > 100
    torch.testing.assert_close(part, torch.full_like(part, 0.37), atol=1e-12, rtol=0)


@pytest.mark.parametrize("ratio", [3, 12])
def test_linear_phase(ratio: int) -> None:
    """The sampling times of ratio * k + 1 samples are symmetric, so a reversed clip gives the reversed
    result."""
    x = torch.randn(ratio * 200 + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = one(x, 16_000 * ratio, 16_000)
    torch.testing.assert_close(one(x.flip(0), 16_000 * ratio, 16_000), out.flip(0), atol=1e-14, rtol=0)


def test_an_impulse_stays_where_it_is() -> None:
    x = torch.zeros(1001)
    x[500] = 1
    out = one(x, 8_000, 16_000)
    assert out.argmax() == 1000
    torch.testing.assert_close(out[1001:1200], out[801:1000].flip(0), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("rate", "target"), PAIRS)
def test_one_sample(rate: int, target: int) -> None:
    """One sample becomes the impulse response: the low-pass sinc of its cut-off frequency, near its
    centre."""
    out = one(torch.full((1,), 0.5, dtype=torch.float64), rate, target)
    assert len(out) == resampled_length(1, rate, target) == math.ceil(target / rate)
    low = reference.CUTOFF * min(1.0, target / rate)
    sinc = 0.5 * low * torch.sinc(low * torch.arange(len(out), dtype=torch.float64) * rate / target)
    torch.testing.assert_close(out, sinc, atol=2e-3 * 0.5 * low, rtol=0)


def test_the_same_rate_passes_through() -> None:
    x = torch.randn(100)
    out, lengths = resample(x, (40, 0, 60), (16_000, 44_100, 16_000), 16_000)
    assert torch.equal(out, x)
    assert lengths == (40, 0, 60)


def test_nothing() -> None:
    for dtype in (torch.float32, torch.float64):
        out, lengths = resample(torch.empty(0, dtype=dtype), (), (), 16_000)
        assert (out.shape, out.dtype, lengths) == ((0,), dtype, ())
        out, lengths = resample(torch.empty(0, dtype=dtype), (0, 0), (8_000, 44_100), 16_000)
        assert (out.shape, out.dtype, lengths) == ((0,), dtype, (0, 0))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3000), st.sampled_from([1_000, 8_000, 16_000, 22_050, 44_100, 48_000, 192_000])
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([16_000, 32_000]),
)
def test_packed_is_one_by_one(clips: list[tuple[int, int]], target: int) -> None:
    lengths, rates = tuple(n for n, _ in clips), tuple(r for _, r in clips)
    x = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(sum(lengths)))
    out, out_lengths = resample(x, lengths, rates, target)
    alone = [one(piece, rate, target) for piece, rate in zip(x.split(lengths), rates, strict=True)]
    assert out_lengths == tuple(len(a) for a in alone)
    assert torch.equal(out, torch.cat(alone))


@pytest.mark.parametrize(("rate", "target"), [*PAIRS[:6], (44_101, 16_000)])
def test_neighbours_do_not_leak(rate: int, target: int) -> None:
    """Not even as 0 times NaN."""
    x = torch.randn(700)
    bad = torch.full((500,), math.nan)
    out, lengths = resample(torch.cat([bad, x, bad]), (500, 700, 500), (rate,) * 3, target)
    assert torch.equal(out.split(lengths)[1], one(x, rate, target))


def test_rows_are_computed_in_bounded_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(60_000)
    whole = one(x, 44_100, 16_000, "reference")
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", {"cpu": 1})
    assert torch.equal(one(x, 44_100, 16_000, "reference"), whole)


def test_kept_weights_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = reference._WeightCache()
    monkeypatch.setattr(reference, "_CACHE", cache)
    monkeypatch.setattr(reference, "CACHE_BYTES", 500_000)
    x = torch.randn(4000)
    first = one(x, 11_025, 16_000, "reference")
    for rate in (8_000, 22_050, 48_000, 11_025):
        one(x, rate, 16_000, "reference")
        assert 0 < cache.bytes() <= 500_000
    assert torch.equal(one(x, 11_025, 16_000, "reference"), first)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_products_do_not_reach_it(precision: str) -> None:
    x = torch.randn(20_000)
    truth = one(x, 44_100, 16_000)
    torch.set_float32_matmul_precision(precision)
    before = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(one(x, 44_100, 16_000), truth)
            assert (x[None] @ x[:, None]).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == precision
        after = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        assert after == before
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mistakes_are_named() -> None:
    x = torch.zeros(10)
    with pytest.raises(TypeError, match="samples must be float32 or float64, received int64"):
        resample(x.long(), (10,), (8_000,), 16_000)
    with pytest.raises(ValueError, match=r"samples must have shape \(S,\)"):
        resample(x[None], (10,), (8_000,), 16_000)
    with pytest.raises(ValueError, match="lengths must add up to the 10 samples, received 9"):
        resample(x, (9,), (8_000,), 16_000)
    with pytest.raises(ValueError, match="rates must hold one number for each of 1 clips"):
        resample(x, (10,), (8_000, 8_000), 16_000)
    with pytest.raises(ValueError, match="rates must be at least 1, received 0"):
        resample(x, (10,), (0,), 16_000)
    with pytest.raises(TypeError, match="target_rate must be an int"):
        resample(x, (10,), (8_000,), 16_000.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be float32 or float64, received torch\.float16"):
        resample(x, (10,), (8_000,), 16_000, dtype=torch.float16)
    with pytest.raises(ValueError, match="samples is data and must not require a gradient"):
        resample(x.requires_grad_(), (10,), (8_000,), 16_000)
