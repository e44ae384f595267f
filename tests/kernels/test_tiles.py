# SPDX-License-Identifier: Apache-2.0
"""The work list of kernels over packed clips: it covers every row once, is kept, and is safe to capture."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from masktrain.kernels import _tiles

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(0, 200), max_size=8).map(tuple), rows=st.sampled_from([1, 16, 64]))
def test_every_row_is_in_one_tile(lengths: tuple[int, ...], rows: int) -> None:
    table = _tiles.tile_table(lengths, rows, CPU)
    assert table.dtype == torch.int32 and table.shape[1] == 4
    assert len(table) == sum(-(-n // rows) for n in lengths)
    covered, sizes = [], []
    for start, n, first, clip in table.tolist():
        assert (start, n) == (sum(lengths[:clip]), lengths[clip]) and first % rows == 0
        covered += [start + i for i in range(first, min(first + rows, n))]
        sizes.append(n)
    assert sorted(covered) == list(range(sum(lengths)))
    assert sizes == sorted(sizes, reverse=True)


def test_layers_share_a_table_and_old_ones_go() -> None:
    first = _tiles.tile_table((3, 4), 16, CPU)
    assert _tiles.tile_table((3, 4), 16, CPU) is first
    for n in range(_tiles.MAX_TABLES):
        _tiles.tile_table((n, 5), 16, CPU)
    assert len(_tiles._recent) == _tiles.MAX_TABLES
    assert _tiles.tile_table((3, 4), 16, CPU) is not first


def test_capture_takes_only_tables_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be copied from the host while a graph is captured, and what it reads must not be freed."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_tiles, "_recent", type(_tiles._recent)())
    monkeypatch.setattr(_tiles, "_captured", {})
    cuda = torch.device("cuda", 0)
    with pytest.raises(RuntimeError, match="run the step once with them, then capture it"):
        _tiles.tile_table((3, 4), 16, cuda)
    table = _tiles.tile_table((3, 4), 16, CPU)
    _tiles._recent[((3, 4), 16, cuda)] = table
    assert _tiles.tile_table((3, 4), 16, cuda) is table
    _tiles._recent.clear()
    assert _tiles.tile_table((3, 4), 16, cuda) is table
