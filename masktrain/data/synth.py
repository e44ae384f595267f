# SPDX-License-Identifier: Apache-2.0
"""A seeded synthesiser of short sound scenes, for the demo corpus.

Each kind of sound is played as a phrase: events in a rhythm with a pattern of pitches that repeats, over
background noise. So a log-mel picture of a clip has lines, sweeps, bursts and repetitions: what lies under a
mask can be told in part from what is visible, as in recorded audio.

All functions take a NumPy generator, lengths in samples and rates in Hz, and return float64 waveforms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Wave = NDArray[np.float64]
Play = Callable[[float, int], Wave]
"""(pitch factor, samples) -> one event."""
_TOP = 0.45
"""Highest frequency of a voice, as a share of the sample rate."""
_CENTRE = 7000.0
"""Highest main frequency of a voice in Hz: what front ends at 16 kHz still see."""
_SEMITONES = (0.0, 2.0, 3.0, 5.0, 7.0, 10.0, 12.0)


def scene(kind: str, rng: Generator, length: int, rate: int) -> Wave:
    """Return `length` samples of one of `KINDS` over background noise, with a peak of -20 to -1 dB."""
    if kind == "mixture":
        first, second = rng.choice(len(VOICES), size=2, replace=False)
        names = list(VOICES)
        wave = _level(phrase(names[first], rng, length, rate))
        wave = wave + rng.uniform(0.4, 1.0) * _level(phrase(names[second], rng, length, rate))
    else:
        wave = phrase(kind, rng, length, rate)
    background = _level(coloured_noise(rng, length, rate, slope=rng.uniform(-1.5, 0.0)))
    wave = _level(wave) + 10 ** (rng.uniform(-50, -20) / 20) * background
    return _level(wave) * 10 ** (rng.uniform(-20, -1) / 20)


def _level(wave: Wave) -> Wave:
    return wave / max(float(np.abs(wave).max()), 1e-9)


def phrase(kind: str, rng: Generator, length: int, rate: int) -> Wave:
    """Return a phrase of one voice: a pattern of one to four events, repeated to the end of the clip."""
    voice = VOICES[kind]
    seconds = length / rate
    beat = rng.uniform(0.12, 0.6) if seconds > 0.8 else seconds / 2
    pattern = [
        (float(rng.choice(_SEMITONES)), float(rng.uniform(0.4, 1.0)), bool(rng.random() < 0.85))
        for _ in range(int(rng.integers(1, 5)))
    ]
    sustain = rng.uniform(0.5, 1.8)
    play = voice(rng, rate)
    out = np.zeros(length)
    for index, start in enumerate(np.arange(rng.uniform(0, 0.5) * beat, seconds, beat)):
        semitones, loudness, sounds = pattern[index % len(pattern)]
        begin = int(start * rate)
        end = min(length, begin + int(beat * sustain * rate))
        if (sounds or index == 0) and end - begin > 16:
            out[begin:end] += loudness * play(2 ** (semitones / 12), end - begin)
    return out


def envelope(length: int, rate: int, attack: float, decay: float) -> Wave:
    """Return a linear attack times an exponential decay (both in s), with a fade of 5 ms at the end."""
    time = np.arange(length) / rate
    return np.minimum(1, time / attack) * np.exp(-time / decay) * np.minimum(1, (time[-1] - time) / 0.005)


def coloured_noise(rng: Generator, length: int, rate: int, slope: float) -> Wave:
    """Return noise whose power spectrum is frequency ** slope."""
    frequency = np.maximum(np.fft.rfftfreq(length, 1 / rate), 20.0)
    return np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * frequency ** (slope / 2), length)


def tone(rng: Generator, rate: int) -> Play:
    """Harmonic stacks with vibrato and one formant-like emphasis."""
    base = float(np.exp(rng.uniform(np.log(90), np.log(500))))
    partials = int(rng.integers(4, 16))
    slope, formant = rng.uniform(0.5, 1.6), rng.uniform(400, 3000)
    vibrato, depth = rng.uniform(3, 8), rng.uniform(0.002, 0.03)
    attack, decay = rng.uniform(0.01, 0.08), rng.uniform(0.2, 1.5)

    def play(pitch: float, length: int) -> Wave:
        time = np.arange(length) / rate
        fundamental = base * pitch
        phase = 2 * np.pi * fundamental * time
        phase -= fundamental * depth / vibrato * np.cos(2 * np.pi * vibrato * time)
        count = max(1, min(partials, int(_TOP * rate / (fundamental * (1 + depth)))))
        # sin(k x) by the Chebyshev recurrence: sin((k+1) x) = 2 cos(x) sin(k x) - sin((k-1) x)
        previous, current, twice = np.zeros(length), np.sin(phase), 2 * np.cos(phase)
        wave = np.zeros(length)
        for k in range(1, count + 1):
            emphasis = 1 + 3 * np.exp(-(((k * fundamental - formant) / 400) ** 2))
            wave += emphasis / k**slope * current
            previous, current = current, twice * current - previous
        return wave * envelope(length, rate, attack, decay)

    return play


def chirp(rng: Generator, rate: int) -> Play:
    """Sweeps up or down, with a second harmonic."""
    top = min(_TOP * rate / 2, _CENTRE)
    low = rng.uniform(200, 0.3 * top)
    high = min(top, low * rng.uniform(2.5, 6))
    start, stop = (low, high) if rng.random() < 0.5 else (high, low)
    curve, harmonic = rng.uniform(0.6, 2.5), rng.uniform(0, 0.5)

    def play(pitch: float, length: int) -> Wave:
        progress = np.linspace(0, 1, length) ** curve
        frequency = np.minimum(start * (stop / start) ** progress * pitch, top)
        phase = 2 * np.pi * np.cumsum(frequency) / rate
        return (np.sin(phase) + harmonic * np.sin(2 * phase)) * envelope(length, rate, 0.01, 1.0)

    return play


def pluck(rng: Generator, rate: int) -> Play:
    """Plucked strings: noise in a delay line with a two-point average (Karplus and Strong 1983)."""
    base = float(np.exp(rng.uniform(np.log(80), np.log(400))))
    loss = rng.uniform(0.985, 0.999)

    def play(pitch: float, length: int) -> Wave:
        period = max(2, round(rate / (base * pitch)))
        periods = -(-length // period)
        out = np.zeros((periods, period))
        out[0] = rng.uniform(-1, 1, period)
        last = 0.0
        for k in range(1, periods):
            before = out[k - 1]
            out[k, 1:] = (0.5 * loss) * (before[1:] + before[:-1])
            out[k, 0] = (0.5 * loss) * (before[0] + last)
            last = float(before[-1])
        return out.reshape(-1)[:length] * envelope(length, rate, 0.002, 3.0)

    return play


def modulation(rng: Generator, rate: int) -> Play:
    """Frequency modulation with an index that decays: bells, brass, growls (Chowning 1973)."""
    carrier = float(np.exp(rng.uniform(np.log(150), np.log(900))))
    ratio = float(rng.choice((0.5, 1.0, 1.41, 2.0, 3.5)))
    index = rng.uniform(1, 6)
    attack, decay = rng.uniform(0.003, 0.1), rng.uniform(0.15, 1.2)

    def play(pitch: float, length: int) -> Wave:
        time = np.arange(length) / rate
        speed = 2 * np.pi * min(carrier * pitch, 0.2 * rate)
        depth = index * np.exp(-time / decay)
        return np.sin(speed * time + depth * np.sin(ratio * speed * time)) * envelope(
            length, rate, attack, decay
        )

    return play


def burst(rng: Generator, rate: int) -> Play:
    """Bursts of band-passed noise."""
    centre = float(np.exp(rng.uniform(np.log(300), np.log(min(0.6 * _TOP * rate, _CENTRE)))))
    octaves = rng.uniform(0.15, 0.8)
    attack, decay = rng.uniform(0.002, 0.15), rng.uniform(0.05, 0.5)

    def play(pitch: float, length: int) -> Wave:
        frequency = np.maximum(np.fft.rfftfreq(length, 1 / rate), 1.0)
        middle = min(centre * pitch, _TOP * rate, _CENTRE)
        gain = np.exp(-0.5 * (np.log2(frequency / middle) / octaves) ** 2)
        noise = np.fft.irfft(np.fft.rfft(rng.standard_normal(length)) * gain, length)
        return _level(noise) * envelope(length, rate, attack, decay)

    return play


def pulses(rng: Generator, rate: int) -> Play:
    """Trains of impulses that ring in two resonances, at a rate that rises or falls."""
    speed, bend = rng.uniform(6, 60), rng.uniform(0.4, 2.5)
    kernel_time = np.arange(int(0.03 * rate)) / rate
    kernel = np.zeros(len(kernel_time))
    for _ in range(2):
        frequency = float(np.exp(rng.uniform(np.log(250), np.log(min(0.8 * _TOP * rate, _CENTRE)))))
        kernel += np.exp(-kernel_time / rng.uniform(0.001, 0.006)) * np.sin(
            2 * np.pi * frequency * kernel_time
        )

    def play(pitch: float, length: int) -> Wave:
        out = np.zeros(length + len(kernel))
        position = 0.0
        while position < length:
            begin = int(position)
            out[begin : begin + len(kernel)] += kernel
            position += rate / (speed * pitch * bend ** (position / length))
        return out[:length] * envelope(length, rate, 0.002, 2.0)

    return play


VOICES: dict[str, Callable[[Generator, int], Play]] = {
    "tone": tone,
    "chirp": chirp,
    "pluck": pluck,
    "fm": modulation,
    "noise": burst,
    "impulses": pulses,
}
KINDS = (*VOICES, "mixture")
