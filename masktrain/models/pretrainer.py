# SPDX-License-Identifier: Apache-2.0
"""What every model here offers to a training step: predictions of masked tokens, and what they cost."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from masktrain.kernels.mask_gather import mask_gather
from masktrain.models.input_norm import InputNorm
from masktrain.models.positions import clip_of, within_clip
from masktrain.models.transformer import Rows, Stack
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, TokenLayout


class Prediction(NamedTuple):
    """What a model says of the masked tokens, in the order of the plans' `masked`.

    encoder_out: (R, D), the rows that the encoder read, in its own order. pred_recon: (M, P), the reconstructed
    patches of the last plan's masked tokens, None without such a head. pred_class: (M, P), the vectors matched
    against the patches of the first plan's masked tokens, None without such a head.
    """

    encoder_out: Tensor
    pred_recon: Tensor | None
    pred_class: Tensor | None


class EncoderInput(NamedTuple):
    """What the first layer of an encoder reads. x: (R, D), for each clip its leading tokens (class, distillation) and
    then those that the encoder sees. rows: theirs. leading: how many leading tokens a clip has."""

    x: Tensor
    rows: Rows
    leading: int


class Encoded(NamedTuple):
    """One layer's output. tokens: (N, D), packed, in the order of their ids. leading: (B, leading, D)."""

    tokens: Tensor
    leading: Tensor


class Pretrainer(nn.Module):
    """A model of one token grid. config: its own, with `masks` (plans a clip and step: 1, or 2 for two passes) and
    `may_drop_layers` (a step may leave parameters without a gradient). encoder: whose layers `encoded` reads."""

    config: Any
    grid: TokenGrid
    input_norm: InputNorm
    encoder: Stack

    def forward(
        self,
        spectrogram: Spectrogram,
        plans: tuple[MaskPlan, ...],
        mean: Tensor,
        scale: Tensor,
        key: StepKey | None,
    ) -> Prediction:
        """Predict the masked patches.

        plans: `config.masks` of them, over the same clips. mean, scale: of the input norm, in the dtype of the
        frames. key: keys dropout and layerdrop in training mode; None, or evaluation mode, drops nothing.
        """
        raise NotImplementedError

    def encoder_input(
        self, spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, key: StepKey | None
    ) -> EncoderInput:
        """Return what the encoder reads under one plan. key: as in forward."""
        raise NotImplementedError

    def encoded(
        self, spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, layers: Collection[int]
    ) -> dict[int, Encoded]:
        """Return the output of encoder layers, counted from 1, without dropout.

        The last layer's has passed the encoder's final norm, if it has one; layers behind the last asked one are not
        computed. tokens are those that the encoder reads: the visible ones of `plan`, or all of them in a model that
        reads mask tokens as well. Raises ValueError for a layer that the encoder does not have.
        """
        count = self.encoder.config.layers
        if not all(1 <= layer <= count for layer in layers):
            raise ValueError(
                f"{type(self).__name__}: layers are counted from 1 to {count}, received {sorted(layers)}."
            )
        x, rows, leading = self.encoder_input(spectrogram, plan, mean, scale, None)
        outputs = self.encoder.outputs(x, rows, layers)
        clips = len(rows.lengths)
        starts = rows.cu[:-1].long()[:, None] + torch.arange(leading, device=rows.cu.device)
        is_token = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(
            0, starts.flatten(), False
        )
        # the number of tokens follows from counts on the host: no wait for the device
        tokens = torch.nonzero_static(is_token, size=len(x) - clips * leading).flatten()
        return {
            layer: Encoded(
                out.index_select(0, tokens), out.index_select(0, starts.flatten()).unflatten(0, (clips, -1))
            )
            for layer, out in outputs.items()
        }

    def train_flops(self, plans: Sequence[MaskPlan], key: StepKey | None = None) -> int:
        """Return the operations of forward and backward for one batch, as really done. key: of a step whose
        layerdrop counts; None: all layers."""
        raise NotImplementedError

    def activation_bytes(self, tokens: int, clips: int, mask_ratio: float) -> int:
        """Return about how many bytes forward keeps for backward in float32, for `clips` clips of `tokens` tokens
        each."""
        raise NotImplementedError

    def check_columns(self, columns: int) -> None:
        """Raise ConfigError if the model cannot take clips of so many time columns; most take any."""

    def _check(self, plans: tuple[MaskPlan, ...]) -> TokenLayout:
        """Return the layout of the plans, which must be of this model's grid."""
        # not traced: a difference of grids is a fault of the caller, and comparing them would be a guard
        if not torch.compiler.is_compiling():
            name = type(self).__name__
            if len(plans) != self.config.masks:
                raise ValueError(f"{name}: needs {self.config.masks} plans a clip, received {len(plans)}.")
            for plan in plans:
                if plan.layout.grid != self.grid:
                    raise ValueError(
                        f"{name}: the plan was made for {plan.layout.grid}, the model for {self.grid}."
                    )
        return plans[0].layout

    def read_patches(
        self, spectrogram: Spectrogram, layout: TokenLayout, tokens: Tensor, mean: Tensor, scale: Tensor
    ) -> Tensor:
        """Return the normalised patches (K, P) of the given tokens, in the compute dtype; nothing else is read."""
        grid, device = self.grid, spectrogram.frames.device
        weights = next(self.parameters()).dtype
        autocast = torch.is_autocast_enabled(device.type)
        return mask_gather(
            spectrogram.frames,
            layout.cu_frames,
            layout.cu_tokens,
            tokens,
            mean=mean,
            scale=scale,
            freq=grid.freq,
            patch_freq=grid.patch_freq,
            patch_time=grid.patch_time,
            order=grid.order,
            dtype=torch.get_autocast_dtype(device.type) if autocast else weights,
        )


class Leading:
    """Where the tokens of a batch lie when every clip has `extra` rows (class tokens) before its own.

    A selection of tokens is given by its ids, which count through the batch, its cumulative counts and its counts
    on the host. Row numbers count through the batch as well.
    """

    def __init__(self, layout: TokenLayout, extra: int) -> None:
        self.layout = layout
        self.extra = extra
        self.clip = clip_of(layout)
        device = layout.cu_tokens.device
        self.clips = torch.arange(len(layout.lengths), device=device)

    def rows(self, tokens: Tensor | None, cu: Tensor, lengths: tuple[int, ...]) -> Rows:
        """Return the Rows of clips that hold the leading rows and then the given tokens; None: all tokens."""
        layout, extra = self.layout, self.extra
        clip, positions = within_clip(layout, tokens)
        ids = layout.clip_ids.index_select(0, clip)
        if extra:
            slots = self.slots(clip)
            total = len(slots) + extra * len(lengths)
            leading = self.leading(cu)
            # numbered behind the clip's tokens, so that they draw words of their own
            counts = (layout.cu_tokens[1:] - layout.cu_tokens[:-1]).long()
            behind = counts[:, None] + torch.arange(extra, device=cu.device)
            positions = _placed(total, slots, positions, leading, behind.flatten())
            ids = _placed(total, slots, ids, leading, layout.clip_ids.repeat_interleave(extra))
            cu = cu + (extra * torch.arange(len(cu), device=cu.device)).to(cu.dtype)
            lengths = tuple(n + extra for n in lengths)
        return Rows(cu, lengths, layout.clip_ids, ids, positions)

    def slots(self, clip: Tensor) -> Tensor:
        """Return the row of each of packed tokens, whose clips are `clip` (K,) int64."""
        return torch.arange(len(clip), device=clip.device) + self.extra * (clip + 1)

    def all_slots(self, tokens: Tensor) -> Tensor:
        """Return the rows (K,) int64 of these tokens among the rows of all tokens."""
        tokens = tokens.long()
        return tokens + self.extra * (self.clip.index_select(0, tokens) + 1)

    def leading(self, cu: Tensor) -> Tensor:
        """Return the rows (B * extra,) int64 of the leading ones, clip by clip, for packed tokens of cumulative
        counts cu (B+1,)."""
        starts = cu[:-1].long() + self.extra * self.clips
        return (starts[:, None] + torch.arange(self.extra, device=cu.device)).flatten()


def _placed(total: int, slots: Tensor, values: Tensor, others: Tensor, other_values: Tensor) -> Tensor:
    out = values.new_empty(total).index_copy(0, slots, values)
    return out.index_copy(0, others, other_values)
