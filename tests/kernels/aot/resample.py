# SPDX-License-Identifier: Apache-2.0
"""resample ahead of time: the usual ratio, into the float64 waveform of the front end and into float32."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import TENSOR_CORES, Case

from masktrain.kernels.resample._triton import resample


def call(rate: int, target_rate: int, dtype: torch.dtype) -> None:
    resample(torch.zeros(2000), (1000,) * 2, (rate,) * 2, target_rate, dtype=dtype)


def cases() -> Iterator[Case]:
    yield Case("44100 to 16000, float64", lambda: call(44_100, 16_000, torch.float64), TENSOR_CORES)
    yield Case("8000 to 16000, float32", lambda: call(8_000, 16_000, torch.float32), TENSOR_CORES)
