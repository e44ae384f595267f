# SPDX-License-Identifier: Apache-2.0
"""mask_scatter against a row by row copy, its gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.mask_scatter import mask_scatter


def split(n: int, n_visible: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    return ids[:n_visible].sort().values, ids[n_visible:].sort().values


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_every_row_lands_where_its_id_says(n_visible, n_masked, width, seed):
    visible, masked = split(n_visible + n_masked, n_visible, seed)
    x, token = torch.randn(n_visible, width), torch.randn(width)
    with poisoned_memory():
        out = mask_scatter(x, token, visible, masked)
    assert out.shape == (n_visible + n_masked, width)
    for row, t in enumerate(visible.tolist()):
        assert torch.equal(out[t], x[row])
    for t in masked.tolist():
        assert torch.equal(out[t], token)


@pytest.mark.parametrize(("n_visible", "n_masked"), [(3, 5), (4, 0), (0, 4)])
def test_gradients(n_visible, n_masked):
    visible, masked = split(n_visible + n_masked, n_visible, 1)
    x = torch.randn(n_visible, 3, dtype=torch.float64, requires_grad=True)
    token = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: mask_scatter(x, t, visible, masked), (x, token))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_output_and_float32_mask_token(dtype):
    visible, masked = split(9, 4, 2)
    x = torch.randn(4, 5).to(dtype).requires_grad_()
    token = torch.randn(5, requires_grad=True)
    out = mask_scatter(x, token, visible, masked)
    assert out.dtype == dtype
    assert torch.equal(out[masked.long()], token.to(dtype).expand(5, 5))
    weights = torch.randn(9, 5).to(dtype)
    (out * weights).sum().backward()
    assert torch.equal(x.grad, weights[visible.long()])
    truth = weights[masked.long()].double().sum(0)
    assert (token.grad.double() - truth).abs().max() <= torch.finfo(dtype).eps * truth.abs().max()


def test_non_contiguous_inputs():
    visible, masked = split(9, 4, 3)
    x, token = torch.randn(8, 10), torch.randn(10)
    got = mask_scatter(x[::2, ::2], token[::2], visible.repeat_interleave(2)[::2], masked)
    assert torch.equal(got, mask_scatter(x[::2, ::2].contiguous(), token[::2].contiguous(), visible, masked))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"x_visible": torch.zeros(2, 3, dtype=torch.int32)},
            TypeError,
            "x_visible must be float16 or bfloat16",
        ),
        ({"x_visible": torch.zeros(3, 3)}, ValueError, r"visible must have shape \(3,\), received \(2,\)"),
        ({"mask_token": torch.zeros(4)}, ValueError, r"mask_token must have shape \(3,\), received \(4,\)"),
        ({"masked": torch.zeros(1, dtype=torch.int64)}, TypeError, "masked must be int32, received int64"),
        (
            {"mask_token": torch.zeros(3, device="meta")},
            ValueError,
            "mask_token must be on cpu like x_visible",
        ),
    ],
)
def test_refuses(change, error, words):
    good = {
        "x_visible": torch.zeros(2, 3),
        "mask_token": torch.zeros(3),
        "visible": torch.tensor([0, 2], dtype=torch.int32),
        "masked": torch.tensor([1], dtype=torch.int32),
    }
    with pytest.raises(error, match=words):
        mask_scatter(**good | change)
