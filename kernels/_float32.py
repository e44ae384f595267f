# SPDX-License-Identifier: Apache-2.0
"""float32 products that are float32, whatever the training step has switched on around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_float32(device_type: str) -> Iterator[None]:
    """Switch autocast, TF32 and bf16 products off inside, and put everything back as it was.

    Signals have a dynamic range that 10 bits of mantissa do not hold: TF32 moves a log-mel value by up to
    1.8. PyTorch keeps the setting twice (an older and a newer interface) and refuses products while the two
    disagree, so the older one, which sets both, is used, and both are restored.
    """
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precision = torch.get_float32_matmul_precision()
    saved = [m.fp32_precision for m in matmuls]
    with torch.autocast(device_type, enabled=False):
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            for matmul, value in zip(matmuls, saved, strict=True):
                matmul.fp32_precision = value
