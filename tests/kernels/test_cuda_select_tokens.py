# SPDX-License-Identifier: Apache-2.0
"""select_tokens in CUDA C++: its block algorithm on the host gives the reference's tokens; when it serves, and why not."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _cuda_native
from masktrain.kernels.select_tokens import _cuda, select_tokens
from masktrain.kernels.select_tokens.reference import LOG2

REPO = Path(__file__).resolve().parents[2]
COUNTER = torch.tensor([0x1234_5678_9ABC, 3])
ORDERS = (0, 1, 2)


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tensor, Tensor]]:
    """select_tokens by the block algorithm, compiled for the host, `order` being that of a block's threads."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("host") / "select_clip.so"
    source = REPO / "tests" / "support" / "select_clip_host.cpp"
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{REPO / 'csrc' / 'cuda'}"]
    subprocess.run([compiler, *options, "-shared", "-fPIC", source, "-o", library], check=True, timeout=120)
    function = ctypes.CDLL(str(library)).select_clip_host

    def pointer(x: Tensor | None, first: int = 0) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if x is None else x.data_ptr() + first * x.element_size())

    def run(
        cu: Tensor,
        n_tokens: tuple[int, ...],
        n_visible: tuple[int, ...],
        counter: Tensor,
        ids: Tensor,
        *,
        classes: Tensor | None = None,
        scores: Tensor | None = None,
        sample: bool = True,
        shared: bool = False,
        stream: int = 0,
        order: int = 0,
    ) -> tuple[Tensor, Tensor]:
        del cu
        visible = torch.full((sum(n_visible),), -7, dtype=torch.int32)
        masked = torch.full((sum(n_tokens) - sum(n_visible),), -7, dtype=torch.int32)
        start = first = 0
        for clip, (n, own) in enumerate(zip(n_tokens, n_visible, strict=True)):
            outputs = [pointer(visible, first), pointer(masked, start - first)]
            function(
                *(outputs if scores is None else reversed(outputs)),
                start,
                n,
                own if scores is None else n - own,
                pointer(counter),
                ctypes.c_int64(0 if shared else int(ids[clip])),
                pointer(classes, start),
                ctypes.c_int64(0 if classes is None else classes.element_size()),
                pointer(scores, start),
                pointer(LOG2 if sample else None),
                ctypes.c_int64(stream),
                order,
            )
            start, first = start + n, first + own
        return visible, masked

    return run


def arguments(n_tokens: tuple[int, ...], n_visible: tuple[int, ...]) -> tuple:
    cu = torch.tensor([0, *accumulate(n_tokens)], dtype=torch.int32)
    return cu, n_tokens, n_visible, COUNTER, torch.arange(len(n_tokens)) * 12_345_678_901


def assert_selects_the_same(on_host, n_tokens, n_visible, order: int = 0, **options) -> None:
    given_ = arguments(tuple(n_tokens), tuple(n_visible))
    ours = on_host(*given_, **options, order=order)
    theirs = select_tokens(*given_, **options, implementation="reference")
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine, expected)


@st.composite
def clips(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    n_tokens = tuple(draw(st.lists(st.integers(0, 600), min_size=1, max_size=4)))
    return n_tokens, tuple(draw(st.sampled_from([0, n, n // 2, draw(st.integers(0, n))])) for n in n_tokens)


@settings(max_examples=120, deadline=None)
@given(
    clips(),
    st.sampled_from([None, 1, 3, 255, 2**30 - 1]),
    st.sampled_from([None, "drawn", "equal", "odd"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.sampled_from(ORDERS),
)
def test_selects_what_the_reference_selects(on_host, counts, largest, kind, sample, stream, order) -> None:
    n_tokens, n_visible = counts
    total, g = sum(n_tokens), torch.Generator().manual_seed(stream)
    options: dict = {"stream": stream, "order": order}
    if largest is not None:
        dtype = torch.uint8 if largest < 256 else torch.int64 if sample else torch.int32
        options["classes"] = torch.randint(0, largest + 1, (total,), generator=g).to(dtype)
    if kind is not None:
        odd = torch.tensor(
            [0.0, -0.0, -1.0, float("nan"), float("inf"), -float("inf"), 2.0**-45, 2.0**45, 1e-44]
        )
        drawn = torch.randn(total, generator=g).exp()
        scores = {
            "drawn": drawn,
            "equal": torch.ones(total),
            "odd": odd[torch.randint(0, len(odd), (total,), generator=g)],
        }
        options |= {"scores": scores[kind], "sample": sample}
    assert_selects_the_same(on_host, n_tokens, n_visible, **options)


@pytest.mark.parametrize("order", ORDERS)
def test_the_longest_clip_and_one_mask_for_all(on_host, order: int) -> None:
    longest = _cuda.MOST_TOKENS
    classes = torch.arange(longest) % 2
    assert_selects_the_same(on_host, (longest,), (longest // 4,), order, classes=classes)
    # all of one score: every token ties
    equal = torch.ones(longest)
    assert_selects_the_same(on_host, (longest,), (longest // 3,), order, scores=equal, sample=False)
    assert_selects_the_same(on_host, (40, 40), (10, 10), order, shared=True)


def test_the_longest_clip_is_that_of_the_header() -> None:
    text = (REPO / "csrc" / "include" / "masktrain_cuda.h").read_text()
    assert f"#define MT_CUDA_SELECT_MOST_TOKENS {_cuda.MOST_TOKENS}\n" in text


def test_when_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_cuda_native, "_load", lambda: SimpleNamespace(reason=None))
    assert _cuda.why_not(on_gpu, (512, _cuda.MOST_TOKENS)) is None
    assert _cuda.why_not(on_gpu, ()) is None
    assert "at most 7936 tokens, not 7937" in str(_cuda.why_not(on_gpu, (512, _cuda.MOST_TOKENS + 1)))
    assert "not yet measured" in str(_cuda.not_unasked(on_gpu, (512,)))
    assert _cuda.not_unasked(torch.zeros(1), (512,)) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    assert "compute capability 7.5 or newer" in str(_cuda.why_not(on_gpu, (512,)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scored", [False, True])
def test_on_a_gpu(scored: bool) -> None:
    n_tokens, n_visible = (512, 0, 1, 1212, _cuda.MOST_TOKENS), (128, 0, 1, 303, 5000)
    g = torch.Generator().manual_seed(0)
    options = {"classes": torch.randint(0, 3, (sum(n_tokens),), generator=g).to(torch.uint8)}
    if scored:
        options["scores"] = torch.rand(sum(n_tokens), generator=g)
    given_ = arguments(n_tokens, n_visible)
    moved = [x.cuda() if isinstance(x, Tensor) else x for x in given_]
    if _cuda.why_not(moved[0], n_tokens):
        pytest.skip(str(_cuda.why_not(moved[0], n_tokens)))
    ours = select_tokens(*moved, **{k: v.cuda() for k, v in options.items()}, implementation="native")
    for mine, expected in zip(
        ours, select_tokens(*given_, **options, implementation="reference"), strict=True
    ):
        assert torch.equal(mine.cpu(), expected)
