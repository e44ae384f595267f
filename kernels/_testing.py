# SPDX-License-Identifier: Apache-2.0
"""How tests and benchmarks decide that an implementation is correct.

The truth is the reference in float64 on inputs that were drawn in the low dtype and then widened. For the
output and every gradient, in the largest error and in the 2-norm of the error, an implementation may be at
most twice as far from the truth as the reference in the same dtype on the same device, plus eps(dtype) times
the size of the truth. No constant is tuned to a dtype, an op or a machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NORMS = {"largest error": torch.inf, "2-norm of the error": 2.0}


class Inaccurate(AssertionError):
    """A result is further from the truth than is allowed, or is no result at all.

    ratio: error over what is allowed, NaN where no number can say it.
    """

    def __init__(self, message: str, ratio: float = math.nan) -> None:
        super().__init__(message)
        self.ratio = ratio


def assert_accurate(
    actual: Tensor, plain: Tensor, truth: Tensor, what: str = "output", *, slack: float = 1.0
) -> float:
    """Assert that `actual` is as accurate as `plain`, both against `truth`; return error over what is allowed.

    actual: of the implementation under test. plain: of the reference in the same dtype on the same device.
    truth: of the reference in float64, finite. All of one shape. What is not floating point must be equal to
    the truth. The ratio is the larger one of both norms, 0 where nothing differs. slack: the largest error may be
    so many times what is allowed, for a verdict on one draw: the largest of a few thousand errors fluctuates, their
    2-norm does not. Raises Inaccurate.
    """
    _require(
        actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    )
    _require(actual.dtype == plain.dtype, f"{what}: {actual.dtype}, expected {plain.dtype}")
    if not actual.is_floating_point():
        _require(torch.equal(actual, truth), f"{what}: differs from the reference")
        return 0.0
    _require(truth.dtype == torch.float64, f"{what}: the truth must be float64, received {truth.dtype}")
    _require(bool(truth.isfinite().all()), f"{what}: the truth is not finite")
    if truth.numel() == 0:
        return 0.0
    eps, worst = torch.finfo(actual.dtype).eps, 0.0
    for name, order in NORMS.items():
        error, plain_error, size = (
            float(torch.linalg.vector_norm(t, order)) for t in (actual - truth, plain - truth, truth)
        )
        allowed = 2 * plain_error + eps * size
        ratio = error / allowed if allowed else (0.0 if error == 0 else math.inf)
        # Not `error > allowed`: NaN must fail.
        if not error <= allowed * (slack if order == torch.inf else 1):
            raise Inaccurate(
                f"{what}: {name} is {error:.3g}, allowed is {allowed:.3g} = 2 x {plain_error:.3g} of the "
                f"reference + eps({actual.dtype}) x {size:.3g}",
                ratio,
            )
        worst = max(worst, ratio)
    return worst


def _require(condition: bool, message: str) -> None:
    """Not `assert`: the check also serves users, whose Python may leave assertions out."""
    if not condition:
        raise Inaccurate(message)


def check_op(
    implementation: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    seed: int = 0,
    slack: float = 1.0,
) -> float:
    """Assert that `implementation(*inputs)` and its gradients are as accurate as those of `reference`.

    inputs: positional arguments; gradients are taken for the tensors that require one, along random
    directions drawn from `seed`. Both functions return a tensor or a tuple of tensors, the reference in
    float64 for float64 inputs. The implementation runs with NaN in all memory that it allocates and does not
    write. Returns the largest ratio of error to what is allowed. slack: see `assert_accurate`. Raises Inaccurate.
    """
    with poisoned_memory():
        actual = _run(implementation, inputs, seed)
    plain = _run(reference, inputs, seed)
    truth = _run(reference, [_widen(x) for x in inputs], seed, directions=plain)
    _require(actual.keys() == plain.keys(), f"results {list(actual)}, expected {list(plain)}")
    return max(
        (assert_accurate(actual[what], plain[what], truth[what], what, slack=slack) for what in plain),
        default=0.0,
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill memory that torch allocates without a value (also inside ops) with NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _widen(x: Any) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return x


def _run(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    seed: int,
    directions: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return outputs and gradients by name. `directions`: results in the low dtype, whose dtypes the random
    directions of the gradients are rounded to."""
    leaves = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    result = function(*leaves)
    outputs = (result,) if isinstance(result, Tensor) else tuple(result)
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    wanted = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
    if wanted:
        generator = torch.Generator().manual_seed(seed)
        used, along = [], []
        for i, out in enumerate(outputs):
            if out.requires_grad:
                low = out.dtype if directions is None else directions[f"output {i}"].dtype
                direction = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(low)
                used.append(out)
                along.append(direction.to(out))
        gradients = torch.autograd.grad(used, list(wanted.values()), along, materialize_grads=True)
        found |= {f"gradient of input {i}": g for i, g in zip(wanted, gradients, strict=True)}
    return found
