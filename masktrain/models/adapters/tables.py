# SPDX-License-Identifier: Apache-2.0
"""The fixed position tables that published checkpoints carry: made as the references make them, and recognised.

Ours are computed, so a table of a file is compared with those that we can compute, and says which one to compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masktrain.errors import CheckpointError
from masktrain.models.mae import GridPositions
from masktrain.models.positions import sincos_table
from masktrain.types import TokenGrid, TokenLayout, cumulative

TOLERANCE = 1e-5
"""Far above the rounding of a table, far below what tells two apart."""


def grid_table(kind: str, width: int, grid: TokenGrid, columns: int, leading: int) -> Tensor:
    """Return the (1, leading + freq columns, width) float32 table of one clip, rows of zeros first, as
    facebookresearch/mae:util/pos_embed.py has it. kind: as MaeConfig.positions and decoder_positions."""
    tokens, frames = grid.freq * columns, grid.patch_time * columns
    layout = TokenLayout(
        grid=grid,
        columns=(columns,),
        lengths=(tokens,),
        cu_tokens=cumulative((tokens,), torch.int32, "cpu"),
        cu_frames=cumulative((frames,), torch.int64, "cpu"),
        clip_ids=torch.zeros(1, dtype=torch.int64),
    )
    table = GridPositions(kind, width).of(layout, None, torch.float32)
    return torch.cat([torch.zeros(leading, width), table])[None]


def table_kind(
    name: str, table: Tensor, kinds: Sequence[str], grid: TokenGrid, columns: int, leading: int
) -> str:
    """Return the first of `kinds` whose table this is. Raises CheckpointError for one that is none of them."""
    for kind in kinds:
        if _near(table, grid_table(kind, table.shape[-1], grid, columns, leading)):
            return kind
    raise CheckpointError(
        f"weights: {name} is none of the fixed tables {', '.join(kinds)} over {grid.freq} x {columns} tokens in order "
        f"{grid.order!r}. Was it trained on, or made for another grid? --ignore {name} leaves it out, and ours is "
        "computed in its place."
    )


def table_columns(name: str, table: Tensor, width: int, grid: TokenGrid, leading: int) -> int:
    """Return the time columns of a (1, leading + freq columns, width) table. Raises CheckpointError."""
    shape = tuple(table.shape)
    columns, rest = divmod(shape[1] - leading, grid.freq) if len(shape) == 3 else (0, 0)
    if shape[0] != 1 or shape[-1] != width or columns < 1 or rest:
        raise CheckpointError(
            f"weights: {name} has shape {shape}, expected (1, {leading} + {grid.freq} x columns, {width}). Take the "
            "patch and the mel bins of the checkpoint (--tokens.patch-freq, --frontend.mel.n-mels)."
        )
    return columns


def check_flat_table(name: str, table: Tensor, width: int) -> None:
    """Raise CheckpointError unless a (1, length, width) table is sincos_table, of any length.

    The allowance grows with the row, as the rounding of its angles in float32 does.
    """
    shape = tuple(table.shape)
    if len(shape) == 3 and shape[0] == 1 and shape[2] == width:
        allowed = TOLERANCE + 2.0**-22 * torch.arange(shape[1])[None, :, None]
        if bool(((table.float() - sincos_table(shape[1], width)[None]).abs() <= allowed).all()):
            return
    raise CheckpointError(
        f"weights: {name} of shape {shape} is not the fixed table of (1, length, {width}) that this model computes. "
        f"Was it trained on? --ignore {name} leaves it out."
    )


def _near(table: Tensor, expected: Tensor) -> bool:
    tolerance = max(TOLERANCE, 2 * torch.finfo(table.dtype).eps)
    return table.shape == expected.shape and bool(((table.float() - expected).abs() <= tolerance).all())
