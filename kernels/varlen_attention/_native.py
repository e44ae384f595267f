# SPDX-License-Identifier: Apache-2.0
"""varlen_attention by what torch offers.

Five forms, chosen by `form`:
- "varlen": torch.nn.attention.varlen, FlashAttention-2 over packed sequences: CUDA, half types, no dropout.
- "sdpa": clips of one length are a dense batch.
- "split": one scaled_dot_product_attention per clip, on views that split() makes (the backward of a slice
  would fill a whole tensor for each clip).
- "padded": clips of similar length side by side with a key mask, for a GPU that "varlen" does not serve.
- "explicit": no fused attention takes dropout bits of ours, so the weights of a few clips at a time are
  computed, and again in backward. Saved are q, k and v; what is held at once is bounded by MAX_WEIGHTS.
No form was run on a GPU yet. "varlen" cannot run elsewhere; the others give the same values on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from masktrain.kernels.dropout import attention_keep_padded

# Attention weights held at one time, unless one clip alone has more: 64 MiB in float32 on a GPU. A CPU is
# fastest when the weights of a group stay in its cache.
MAX_WEIGHTS = {"cuda": 1 << 24, "cpu": 1 << 18}
# Share of the padded weights that padding may take where clips are put side by side. On a CPU a clip by
# itself is enough work, so only clips of one length are.
MAX_PADDING = {"cuda": 0.25, "cpu": 0.0}


def form(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    head_width: int,
    lengths: tuple[int, ...],
    dropout_p: float,
) -> tuple[str, str]:
    """Return the form that serves and why. capability: of the CUDA device, (0, 0) elsewhere."""
    if dropout_p > 0:
        return "explicit", "attention dropout: no fused attention takes counter-based bits"
    if len(set(lengths)) <= 1:
        return "sdpa", "clips of one length"
    if device != "cuda":
        return "split", "clips of different length, no packed attention on this device"
    reason = varlen_why_not(dtype, capability, head_width)
    return ("varlen", "packed FlashAttention-2") if reason is None else ("padded", reason)


def varlen_why_not(dtype: torch.dtype, capability: tuple[int, int], head_width: int) -> str | None:
    """Return None if torch.nn.attention.varlen serves, or the reason why not."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"packed FlashAttention-2 takes float16 and bfloat16, not {dtype}"
    if capability < (8, 0):
        return (
            f"packed FlashAttention-2 needs compute capability 8.0, this is {capability[0]}.{capability[1]}"
        )
    if head_width % 8 or head_width > 256:
        return (
            f"packed FlashAttention-2 takes head widths that are multiples of 8 up to 256, not {head_width}"
        )
    return None


@dataclass(frozen=True)
class Group:
    """Clips that are computed side by side in slots of n rows each.

    clips: their places in the batch. rows: where their rows lie in the packed tensor. slots: where these rows
    lie among the clips * n padded rows; None if every slot is full.
    """

    clips: tuple[int, ...]
    lengths: tuple[int, ...]
    n: int
    rows: slice | Tensor
    slots: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """Return packed (N, H, Dh) as (clips, H, n, Dh), 0 in empty slots."""
        part = x[self.rows] if isinstance(self.rows, slice) else x.index_select(0, self.rows)
        if self.slots is not None:
            full = part.new_zeros((len(self.clips) * self.n, *part.shape[1:]))
            part = full.index_copy(0, self.slots, part)
        return part.unflatten(0, (len(self.clips), self.n)).transpose(1, 2)

    def put(self, out: Tensor, value: Tensor) -> None:
        """Write (clips, H, n, Dh) to the packed rows of `out`."""
        part = value.transpose(1, 2).flatten(0, 1)
        if self.slots is not None:
            part = part.index_select(0, self.slots)
        out[self.rows] = part.to(out.dtype)

    def key_mask(self, device: torch.device) -> Tensor | None:
        """Return (clips, 1, 1, n) bool, True for a key that exists, or None if all do."""
        if self.slots is None:
            return None
        sizes = torch.tensor(self.lengths, device=device)
        return (torch.arange(self.n, device=device) < sizes[:, None])[:, None, None, :]


def groups(
    lengths: tuple[int, ...], heads: int, device: torch.device, *, most: int, padding: float
) -> list[Group]:
    """Return the clips in groups of similar length, longest first, clips without rows left out.

    most: attention weights of a group, unless one clip has more. padding: share of them that may be padding.
    """
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    order = sorted((b for b, n in enumerate(lengths) if n), key=lambda b: (-lengths[b], b))
    runs: list[list[int]] = []
    used = 0
    for b in order:
        n = lengths[b]
        if runs:
            n_max, count = lengths[runs[-1][0]], len(runs[-1]) + 1
            area = count * n_max * n_max
            if area * heads <= most and used + n * n >= (1 - padding) * area:
                runs[-1].append(b)
                used += n * n
                continue
        runs.append([b])
        used = n * n
    return [_group(run, lengths, starts, device) for run in runs]


def _group(run: list[int], lengths: tuple[int, ...], starts: list[int], device: torch.device) -> Group:
    run = sorted(run)
    sizes = tuple(lengths[b] for b in run)
    n = max(sizes)
    rows: slice | Tensor
    if starts[run[-1] + 1] - starts[run[0]] == sum(sizes):
        rows = slice(starts[run[0]], starts[run[-1] + 1])
    else:
        rows = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in run]).to(device)
    slots = None
    if min(sizes) < n:
        slots = torch.cat([torch.arange(i * n, i * n + size) for i, size in enumerate(sizes)]).to(device)
    return Group(tuple(run), sizes, n, rows, slots)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    lengths: tuple[int, ...],
    *,
    dropout_p: float,
    counter: Tensor | None,
    clip_ids: Tensor | None,
    site: int,
) -> Tensor:
    """See op.py."""
    if q.shape[0] == 0:
        return q + k + v
    device = q.device.type
    capability = torch.cuda.get_device_capability(q.device) if device == "cuda" else (0, 0)
    chosen, _ = form(device, q.dtype, capability, q.shape[2], lengths, dropout_p)
    with torch.autocast(device, enabled=False):
        if chosen == "explicit":
            return _Explicit.apply(q, k, v, lengths, dropout_p, counter, clip_ids, site)
        if chosen == "sdpa":
            return sdpa(q, k, v, lengths)
        if chosen == "split":
            return split(q, k, v, lengths)
        if chosen == "padded":
            return padded(q, k, v, lengths, MAX_PADDING[device])
        return varlen(q, k, v, cu, lengths)


def varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Packed FlashAttention-2."""
    from torch.nn.attention.varlen import varlen_attn

    # The first seven arguments are the same in every version; the scale is 1 / sqrt(Dh) unless given.
    out = varlen_attn(q, k, v, cu, cu, max(lengths), max(lengths))
    assert isinstance(out, Tensor)
    return out


def sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Clips of one length, at least one of them."""
    dense = (x.unflatten(0, (len(lengths), lengths[0])).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*dense).transpose(1, 2).flatten(0, 1)


def split(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Each clip by itself."""
    clips = zip(*(x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v)), strict=True)
    outputs = [F.scaled_dot_product_attention(*clip)[0].transpose(0, 1) for clip in clips if clip[0].numel()]
    return torch.cat(outputs)


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], padding: float) -> Tensor:
    """Clips of similar length side by side."""
    out = torch.empty_like(q)
    # Fused attention holds no weights: a group has no need to be small.
    for group in groups(lengths, 1, q.device, most=1 << 62, padding=padding):
        value = F.scaled_dot_product_attention(
            group.take(q), group.take(k), group.take(v), attn_mask=group.key_mask(q.device)
        )
        group.put(out, value)
    return out


class _Explicit(torch.autograd.Function):
    """Attention with dropout on its weights; forward and backward hold the weights of one group at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        dropout_p: float,
        counter: Tensor,
        clip_ids: Tensor,
        site: int,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, counter, clip_ids)
        device = q.device.type
        ctx.groups = groups(
            lengths, q.shape[1], q.device, most=MAX_WEIGHTS[device], padding=MAX_PADDING[device]
        )
        ctx.options = (dropout_p, site)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for group in ctx.groups:
            qg, kg, vg = (_wide(group.take(x)) for x in (q, k, v))
            weights = _weights(qg, kg, group)
            weights *= _factors(group, weights, dropout_p, counter, clip_ids, site)
            group.put(out, weights @ vg)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, counter, clip_ids = ctx.saved_tensors
        dropout_p, site = ctx.options
        grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        with torch.autocast(q.device.type, enabled=False):
            for group in ctx.groups:
                qg, kg, vg, gg = (_wide(group.take(x)) for x in (q, k, v, grad))
                weights = _weights(qg, kg, group)
                factors = _factors(group, weights, dropout_p, counter, clip_ids, site)
                # d out / d weights, then through the factors and the softmax.
                slope = (gg @ vg.mT).mul_(factors)
                factors *= weights
                group.put(grads[2], factors.mT @ gg)
                slope = torch._softmax_backward_data(slope, weights, -1, weights.dtype)
                slope *= 1 / math.sqrt(qg.shape[-1])
                group.put(grads[0], slope @ kg)
                group.put(grads[1], slope.mT @ qg)
        return (*grads, None, None, None, None, None)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def _weights(q: Tensor, k: Tensor, group: Group) -> Tensor:
    """Return softmax(q k^T / sqrt(Dh)) over the keys that exist: (clips, H, n, n)."""
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.mT
    mask = group.key_mask(q.device)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return torch.softmax(scores, -1)


def _factors(
    group: Group, weights: Tensor, dropout_p: float, counter: Tensor, clip_ids: Tensor, site: int
) -> Tensor:
    """Return 0 or 1 / (1 - p) for each weight, 0 outside a clip."""
    ids = clip_ids[torch.tensor(group.clips, device=clip_ids.device)]
    return attention_keep_padded(
        group.lengths, weights.shape[1], dropout_p, counter, ids, site=site, dtype=weights.dtype
    )
