# SPDX-License-Identifier: Apache-2.0
"""philox_words ahead of time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from aot import Case

from masktrain.kernels.philox import Purpose
from masktrain.kernels.philox._triton import philox_words


def cases() -> Iterator[Case]:
    counter, ids = torch.zeros(2, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    yield Case("words", lambda: philox_words(counter, ids, 512, purpose=Purpose.MASK, stream=0))
