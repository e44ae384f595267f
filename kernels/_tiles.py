# SPDX-License-Identifier: Apache-2.0
"""The work list of kernels over packed clips: which rows of which clip a program computes.

It follows from the lengths, which the host knows, so a ragged batch launches exactly the programs that have work,
and nothing waits for the device.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

# Tables that are kept: those of the latest batches, which all layers share, forward and backward.
MAX_TABLES = 64
_recent: OrderedDict[tuple[tuple[int, ...], int, torch.device], Tensor] = OrderedDict()
# A captured graph reads its table at each replay: these are never freed.
_captured: dict[tuple[tuple[int, ...], int, torch.device], Tensor] = {}


def tile_table(lengths: tuple[int, ...], rows: int, device: torch.device) -> Tensor:
    """Return (tiles, 4) int32 on `device`: first row of the clip in the batch, rows of the clip, first row of the
    tile in the clip, place of the clip in the batch.

    Tiles have `rows` rows, the last of a clip what is left; a clip without rows has no tile. The longest clips
    come first: with full attention a tile's work grows with the clip, and what is started last should be short.
    Raises RuntimeError while a CUDA graph is captured, unless the table was made before: a graph must not
    depend on a copy from the host.
    """
    key = (lengths, rows, device)
    table = _recent.get(key)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        table = _captured.get(key, table)
        if table is None:
            raise RuntimeError(
                f"a CUDA graph is captured and no batch with these {len(lengths)} lengths ran before; run the "
                "step once with them, then capture it."
            )
        _captured[key] = table
        return table
    if table is None:
        host = torch.tensor(_entries(lengths, rows), dtype=torch.int32).view(-1, 4)
        # From pinned memory the copy does not make the host wait.
        table = host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
        _recent[key] = table
        if len(_recent) > MAX_TABLES:
            _recent.popitem(last=False)
    _recent.move_to_end(key)
    return table


def _entries(lengths: tuple[int, ...], rows: int) -> list[tuple[int, int, int, int]]:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    order = sorted(range(len(lengths)), key=lambda b: (-lengths[b], b))
    return [(starts[b], lengths[b], first, b) for b in order for first in range(0, lengths[b], rows)]
