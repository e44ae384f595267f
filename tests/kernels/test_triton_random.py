# SPDX-License-Identifier: Apache-2.0
"""Random words and dropout in Triton: the bits of the reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from masktrain.kernels import _dispatch, _triton
from masktrain.kernels._testing import check_op, poisoned_memory
from masktrain.kernels.dropout import dropout
from masktrain.kernels.philox import Purpose, philox_words

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = _triton.why_not(torch.zeros(0, device=DEVICE))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

KEYS = [(0, 0, 0), (2**48 - 1, 2**32 - 1, 2**32 - 1), (2**40 + 7, 2**31, 2**31)]


def counter(seed: int, step: int) -> Tensor:
    return torch.tensor([seed, step], device=DEVICE)


def any_ids(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=g).to(DEVICE)


@pytest.mark.parametrize(("seed", "step", "stream"), KEYS)
@pytest.mark.parametrize(("rows", "n"), [(0, 5), (3, 0), (1, 1), (5, 3), (2, 70), (1, 4099), (40, 9)])
def test_words_are_those_of_the_reference(seed: int, step: int, stream: int, rows: int, n: int) -> None:
    arguments, options = (counter(seed, step), any_ids(rows), n), {"purpose": Purpose.MASK, "stream": stream}
    with poisoned_memory():
        words = philox_words(*arguments, **options, implementation="triton")
    assert torch.equal(words, philox_words(*arguments, **options, implementation="reference"))


def test_words_of_every_purpose_and_of_strided_arguments() -> None:
    for purpose in (0, *Purpose, 2**16 - 1):
        arguments = (torch.tensor([5, 0, 6, 0], device=DEVICE)[::2], any_ids(6)[::2], 6)
        words = philox_words(*arguments, purpose=purpose, implementation="triton")
        assert torch.equal(words, philox_words(*arguments, purpose=purpose, implementation="reference"))


def test_opcheck_of_words() -> None:
    arguments = (counter(5, 6), any_ids(3), 9, int(Purpose.MASK), 4)
    torch.library.opcheck(torch.ops.masktrain.philox_words_triton.default, arguments)


def dropout_arguments(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return counter(2**47 + 3, 2**31 + 6), any_ids(n), torch.randint(0, 2**33, (n,), generator=g).to(DEVICE)


# Row blocks and column blocks of the kernel with tails in each, one row, one value, nothing.
SIZES = [(0, 8), (4, 0), (1, 1), (1, 8), (3, 9), (37, 770), (70, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "width"), SIZES)
def test_dropout_is_as_accurate_as_the_reference_and_drops_the_same(
    n: int, width: int, dtype: torch.dtype
) -> None:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype).requires_grad_()
    keys = dropout_arguments(n)

    def run(implementation: str):
        return lambda x: dropout(x, 0.3, *keys, site=2**32 - 1, implementation=implementation)

    check_op(run("triton"), run("reference"), (x,))
    ours, theirs = run("triton")(x + 1), run("reference")(x + 1)
    assert torch.equal(ours == 0, theirs == 0)


@pytest.mark.parametrize("p", [1 / 65536, 0.5, 0.999])
def test_dropout_of_any_rate(p: float) -> None:
    x, keys = torch.full((8, 300), 3.0, device=DEVICE), dropout_arguments(8)
    ours, theirs = (dropout(x, p, *keys, site=1, implementation=i) for i in ("triton", "reference"))
    assert torch.equal(ours, theirs)


def test_dropout_of_strided_inputs_and_strided_gradients() -> None:
    wide = torch.randn(20, 30, device=DEVICE)
    count, ids, positions = dropout_arguments(10)
    gradients = []
    for implementation in ("triton", "reference"):
        x = wide[::2, ::3].detach().requires_grad_()
        y = dropout(x, 0.4, count, ids, positions, site=3, implementation=implementation)
        y.mT.sum(1, keepdim=True).expand(10, 10).backward(wide[:10, :10].mT)
        gradients.append((y.detach(), x.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


def test_dropped_values_are_zero_whatever_they_were() -> None:
    x, keys = torch.full((4, 64), torch.nan, device=DEVICE), dropout_arguments(4)
    out = dropout(x, 0.5, *keys, site=0, implementation="triton")
    assert set(out.isnan().flatten().tolist()) == {True, False} and not out.nan_to_num().any()


def test_opcheck_of_dropout() -> None:
    x = torch.randn(5, 12, device=DEVICE, requires_grad=True)
    torch.library.opcheck(
        torch.ops.masktrain.dropout_triton.default, (x, 20000, *dropout_arguments(5), 3), rtol=1e-5, atol=1e-6
    )


def test_compiled_step_has_new_bits_each_step_without_recompiling() -> None:
    ids, positions = torch.arange(6, device=DEVICE), torch.arange(6, device=DEVICE)

    def step(x: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        x = dropout(torch.tanh(x), 0.5, key, ids, positions, site=1, implementation="triton")
        return x, philox_words(key, ids, 7, purpose=Purpose.MASK, implementation="triton")

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, seen = torch.randn(6, 24, device=DEVICE, requires_grad=True), set()
    for number in range(3):
        y, words = compiled(x, counter(5, number))
        expected, expected_words = step(x, counter(5, number))
        assert torch.equal(y, expected) and torch.equal(words, expected_words)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), x)[0])
        seen.add(tuple((y != 0).flatten().tolist()))
    assert len(seen) == 3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_is_interpreted_serves_only_by_request(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cuda":
        pytest.skip("on a GPU Triton is the first choice")
    x, keys = torch.zeros(4, 8), dropout_arguments(4)
    before = _dispatch.chosen()
    try:
        _dispatch.record(())
        dropout(x, 0.5, *keys, site=0)
        (choice,) = _dispatch.chosen()
        assert choice.name != "triton" and dict(choice.passed_over)["triton"] == _triton.not_unasked(x)
        monkeypatch.setenv(_dispatch.ENV, "triton")
        _dispatch.record(())
        dropout(x, 0.5, *keys, site=0)
        assert [c.name for c in _dispatch.chosen()] == ["triton"]
    finally:
        _dispatch.record(before)


def test_says_what_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = dropout_arguments(4)
    with pytest.raises(
        _dispatch.KernelUnavailable, match="takes float16 or bfloat16 or float32, not float64"
    ):
        dropout(
            torch.zeros(4, 8, dtype=torch.float64, device=DEVICE), 0.5, *keys, site=0, implementation="triton"
        )
    assert "CUDA devices" in str(_triton.why_not(torch.zeros(1, device="meta")))
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert "TRITON_INTERPRET=1, set before the start" in str(_triton.why_not(torch.zeros(1)))
    assert _triton.not_unasked(torch.zeros(1)) is None
    monkeypatch.setattr(_triton, "MISSING", "triton cannot be imported (none); `pip install triton`")
    assert _triton._why_not_cuda(0) == _triton.MISSING
