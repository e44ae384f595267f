# SPDX-License-Identifier: Apache-2.0
"""What the tests of native ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from masktrain.kernels import _native


@pytest.fixture(params=range(3), ids=["base", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each instruction set of the native library that this CPU has."""
    library = _native.cpu()
    if library is None:
        pytest.skip(f"{_native.why_not()}")
    best = library.mt_cpu_level()
    if library.mt_set_cpu_level(request.param) != request.param:
        pytest.skip(f"this CPU has {_native.LEVELS[best]} at most")
    yield request.param
    library.mt_set_cpu_level(best)


@pytest.fixture(params=[1, 2, 3], ids="{}_threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads for native functions, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
