# SPDX-License-Identifier: Apache-2.0
"""log_mel ahead of time: frames of Kaldi's filter banks, and centred ones with a pre-emphasised waveform."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import TENSOR_CORES, Case

from masktrain.frontend.presets import preset
from masktrain.kernels.log_mel._triton import log_mel


def call(name: str, dtype: torch.dtype) -> None:
    log_mel(torch.zeros(4000, dtype=dtype), (2000,) * 2, preset(name).mel, dtype=torch.float32)


def cases() -> Iterator[Case]:
    yield Case("mae_ast, float64", lambda: call("mae_ast", torch.float64), TENSOR_CORES)
    yield Case("passt, float32", lambda: call("passt", torch.float32), (90,))
