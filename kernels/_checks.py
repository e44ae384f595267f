# SPDX-License-Identifier: Apache-2.0
"""Argument checks that the ops share.

They look at types, dtypes, shapes, devices and host numbers, never at a tensor's values: nothing here waits
for the device. A wrong type or dtype raises TypeError, everything else ValueError, and each message names the
op, the argument, what it expects and what it received.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FULL_FLOATS = (torch.float32, torch.float64)
INTS = (torch.uint8, torch.int32, torch.int64)


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """Return 'float32 or float64' for a message."""
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(
    op: str, name: str, value: object, dtypes: Sequence[torch.dtype], shape: Sequence[int | str]
) -> None:
    """Check that `value` is a tensor of one of `dtypes` and of `shape`; a string stands for a free size.

    A size written like "B+1" is free but at least 1.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, received {type(value).__name__}.")
    if value.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {dtype_names(dtypes)}, received {dtype_names([value.dtype])}.")
    fits = value.dim() == len(shape) and all(
        size >= (1 if want.endswith("+1") else 0) if isinstance(want, str) else size == want
        for size, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        want = ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{op}: {name} must have shape ({want}), received {tuple(value.shape)}.")


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Check that all tensors (None is skipped) lie on the device of the first."""
    present = [(name, t) for name, t in tensors.items() if t is not None]
    first, reference = present[0]
    for name, t in present[1:]:
        if t.device != reference.device:
            raise ValueError(f"{op}: {name} must be on {reference.device} like {first}, received {t.device}.")


def check_counts(op: str, name: str, counts: object, size: int | None = None) -> None:
    """Check that `counts` is a tuple of integers >= 0, one for each of `size` clips."""
    if not isinstance(counts, tuple) or not set(map(type, counts)) <= {int}:
        raise TypeError(f"{op}: {name} must be a tuple of int, received {counts!r:.80}.")
    if size is not None and len(counts) != size:
        raise ValueError(
            f"{op}: {name} must hold one number for each of {size} clips, received {len(counts)}."
        )
    if min(counts, default=0) < 0:
        raise ValueError(f"{op}: {name} must hold numbers >= 0, received {min(counts)}.")


def check_at_least(op: str, name: str, value: object, least: int) -> None:
    """Check that `value` is an integer >= `least`."""
    if type(value) is not int:
        raise TypeError(f"{op}: {name} must be an int, received {value!r:.80}.")
    if value < least:
        raise ValueError(f"{op}: {name} must be at least {least}, received {value}.")


def check_draw(op: str, counter: Tensor, clip_ids: Tensor, n_clips: int) -> None:
    """Check the counter [seed, step] and the clip ids of an op that draws at random."""
    check_tensor(op, "counter", counter, (torch.int64,), (2,))
    check_tensor(op, "clip_ids", clip_ids, (torch.int64,), (n_clips,))


def check_shared(op: str, **counts: tuple[int, ...]) -> None:
    """Check that each of `counts` is the same for all clips, which one mask for all of them needs."""
    for name, values in counts.items():
        if len(set(values)) > 1:
            raise ValueError(
                f"{op}: shared=True needs equal {name} in all clips, received {min(values)} to {max(values)}."
            )


def check_choice(op: str, name: str, value: object, allowed: Sequence[str]) -> None:
    """Check that `value` is one of `allowed`."""
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{op}: {name} must be one of {names}, received {value!r}.")


def check_no_gradient(op: str, **tensors: Tensor) -> None:
    """Check that no gradient is asked of tensors that the op treats as data."""
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if t.requires_grad:
                raise ValueError(
                    f"{op}: {name} is data and must not require a gradient, received one that does."
                )


def check_patches(
    op: str,
    frames: Tensor,
    cu_frames: Tensor,
    cu_tokens: Tensor,
    index_name: str,
    index: Tensor,
    *,
    mean: Tensor,
    scale: Tensor,
    freq: int,
    patch_freq: int,
    patch_time: int,
    order: str,
) -> None:
    """Check what the ops that read patches from a packed spectrogram share."""
    check_tensor(op, "frames", frames, FULL_FLOATS, ("T", "F"))
    check_tensor(op, "cu_frames", cu_frames, (torch.int64,), ("B+1",))
    check_tensor(op, "cu_tokens", cu_tokens, (torch.int32,), (cu_frames.shape[0],))
    check_tensor(op, index_name, index, (torch.int32,), ("K",))
    for name, value in (("freq", freq), ("patch_freq", patch_freq), ("patch_time", patch_time)):
        check_at_least(op, name, value, 1)
    bins = frames.shape[1]
    if freq * patch_freq > bins:
        raise ValueError(
            f"{op}: freq * patch_freq must be at most the {bins} bins, received {freq} * {patch_freq}."
        )
    for name, values in (("mean", mean), ("scale", scale)):
        size = 1 if isinstance(values, Tensor) and values.shape == (1,) else bins
        check_tensor(op, name, values, (frames.dtype,), (size,))
    check_choice(op, "order", order, ("time", "freq"))
    tensors = {"frames": frames, "cu_frames": cu_frames, "cu_tokens": cu_tokens, index_name: index}
    check_devices(op, **tensors, mean=mean, scale=scale)
    check_no_gradient(op, frames=frames, mean=mean, scale=scale)
