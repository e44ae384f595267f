# SPDX-License-Identifier: Apache-2.0
"""The masked patches of a batch as targets, and the trivial predictors that every reconstruction has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from masktrain.kernels.mask_gather import mask_gather
from masktrain.kernels.masked_patch_loss import masked_patch_loss
from masktrain.types import MaskPlan, Spectrogram, TokenGrid

EPS = 1e-6


def masked_patches(frames: Tensor, plan: MaskPlan, mean: Tensor, scale: Tensor) -> Tensor:
    """Return the normalised masked patches (M, P)."""
    layout = plan.layout
    return mask_gather(
        frames,
        layout.cu_frames,
        layout.cu_tokens,
        plan.masked,
        mean=mean,
        scale=scale,
        **_grid(layout.grid),
    )


def squared_error(
    predicted: Tensor,
    spectrogram: Spectrogram,
    plan: MaskPlan,
    mean: Tensor,
    scale: Tensor,
    *,
    norm_pix_loss: bool = False,
) -> Tensor:
    """Return the sum of the squared error of predicted (M, P) over all masked values, a scalar."""
    layout = plan.layout
    return masked_patch_loss(
        predicted,
        spectrogram.frames,
        layout.cu_frames,
        layout.cu_tokens,
        plan.masked,
        mean=mean,
        scale=scale,
        norm_pix_loss=norm_pix_loss,
        **_grid(layout.grid),
    )


def standardised(patches: Tensor) -> Tensor:
    """Return patches (M, P) by their own mean and unbiased variance, as masked_patch_loss takes its targets."""
    variance, average = torch.var_mean(patches, dim=1, keepdim=True)
    return (patches - average) / torch.sqrt(variance + EPS)


def destandardised(patches: Tensor, average: Tensor, variance: Tensor) -> Tensor:
    """Return patches (M, P) with a mean and a variance (M, 1): standardised(x), with those of x, becomes x."""
    return patches * torch.sqrt(variance + EPS) + average


def clip_errors(predicted: Tensor, targets: Tensor, plan: MaskPlan) -> Tensor:
    """Return (B,) float64, the squared error of predicted (M, P) against targets (M, P) summed over each clip."""
    each = (predicted.double() - targets.double()).square().sum(1)
    counts = torch.tensor(plan.n_masked, device=each.device)
    clip = torch.repeat_interleave(counts, output_size=len(each))
    return each.new_zeros(len(plan.n_masked)).index_add_(0, clip, each)


def per_bin_mean(
    spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor, *, norm_pix_loss: bool = False
) -> Tensor:
    """Return (M, P), what knows only each mel bin's mean would predict for the masked patches.

    The mean of a bin is that over all frames of the batch. Where targets are standardised patch by patch it is the
    bin's mean over the standardised masked patches: the best that any constant per bin can do there.
    """
    if not norm_pix_loss:
        average = spectrogram.frames.mean(0, keepdim=True).expand_as(spectrogram.frames)
        return masked_patches(average, plan, mean, scale)
    grid = plan.layout.grid
    targets = standardised(masked_patches(spectrogram.frames, plan, mean, scale)).double()
    row = mel_rows(plan)
    sums = targets.new_zeros(grid.freq, grid.patch_values).index_add_(0, row, targets)
    counts = torch.bincount(row, minlength=grid.freq).clamp(min=1)
    cells = (sums / counts[:, None]).unflatten(1, _shape(grid))
    cells = cells.mean(1 if grid.order == "time" else 2, keepdim=True).expand_as(cells)
    return cells.flatten(1).index_select(0, row).to(spectrogram.frames.dtype)


def interpolated(spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor) -> Tensor:
    """Return (M, P), each mel bin interpolated linearly in time between the visible frames of its clip.

    Before the first and behind the last visible frame their values are held; a bin that no visible token covers
    has its mean over the visible values of all clips, or the mean of all visible values where no clip shows it.
    Waits for the device: for evaluation.
    """
    visible = seen_cells(spectrogram, plan)
    frames = spectrogram.frames
    known = torch.where(visible, frames, 0).sum(0) / visible.sum(0).clamp(min=1)
    everything = frames[visible].mean() if bool(visible.any()) else frames.new_zeros(())
    known = torch.where(visible.any(0), known, everything)
    filled = [
        _fill(part, shown, known)
        for part, shown in zip(
            frames.split(list(spectrogram.lengths)), visible.split(list(spectrogram.lengths)), strict=True
        )
    ]
    return masked_patches(torch.cat([frames[:0], *filled]), plan, mean, scale)


def visible_levels(
    spectrogram: Spectrogram, plan: MaskPlan, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and variance (M, 1) of each masked patch as far as what is visible tells them.

    The mean is that of the interpolated patch. The variance is interpolated linearly in time between those of the
    visible patches of the same mel bins, held at the ends; the mean over all visible patches where a clip shows none
    of these bins. (The variance of the interpolated patch would be too low: a line between two frames is smoother
    than the frames between them.) Waits for the device: for evaluation.
    """
    layout, grid = plan.layout, plan.layout.grid
    average = interpolated(spectrogram, plan, mean, scale).mean(1, keepdim=True)
    seen = mask_gather(
        spectrogram.frames,
        layout.cu_frames,
        layout.cu_tokens,
        plan.visible,
        mean=mean,
        scale=scale,
        **_grid(grid),
    ).var(1)
    tokens = sum(layout.lengths)
    variance = seen.new_zeros(tokens).index_copy_(0, plan.visible.long(), seen)
    shown = torch.zeros(tokens, dtype=torch.bool, device=seen.device).index_fill_(
        0, plan.visible.long(), True
    )
    otherwise = (seen.sum() / max(1, len(seen))).expand(grid.freq)
    parts = [seen[:0]]
    for values, known, columns in zip(
        variance.split(list(layout.lengths)), shown.split(list(layout.lengths)), layout.columns, strict=True
    ):
        if grid.order == "time":
            parts.append(_fill(values.view(columns, -1), known.view(columns, -1), otherwise).flatten())
        else:
            filled = _fill(values.view(-1, columns).T, known.view(-1, columns).T, otherwise)
            parts.append(filled.T.flatten())
    return average, torch.cat(parts).index_select(0, plan.masked.long())[:, None]


def _fill(frames: Tensor, visible: Tensor, otherwise: Tensor) -> Tensor:
    """Return the values (T, F) of one clip, frames or columns, with what is not visible interpolated along T;
    `otherwise`: (F,), for bins of which nothing is."""
    length = len(frames)
    number = torch.arange(length, device=frames.device)[:, None].expand_as(visible)
    before = torch.where(visible, number, -1).cummax(0).values
    after = torch.where(visible, number, length).flip(0).cummin(0).values.flip(0)
    low = torch.where(before < 0, after, before).clamp(max=max(0, length - 1))
    high = torch.where(after >= length, before, after).clamp(min=0)
    share = (number - low).clamp(min=0).to(frames.dtype) / (high - low).clamp(min=1)
    value = torch.lerp(frames.gather(0, low), frames.gather(0, high), share)
    return torch.where(visible.any(0), value, otherwise)


def seen_cells(spectrogram: Spectrogram, plan: MaskPlan) -> Tensor:
    """Return (T, F) bool: which cells of the packed spectrogram lie in a visible token."""
    layout, grid = plan.layout, plan.layout.grid
    shown = torch.ones(sum(layout.lengths), dtype=torch.bool, device=spectrogram.frames.device)
    shown[plan.masked.long()] = False
    parts = []
    for tokens, columns, length in zip(
        shown.split(list(layout.lengths)), layout.columns, spectrogram.lengths, strict=True
    ):
        cells = tokens.view(columns, grid.freq) if grid.order == "time" else tokens.view(grid.freq, columns).T
        cells = cells.repeat_interleave(grid.patch_time, 0).repeat_interleave(grid.patch_freq, 1)[:length]
        unread = cells.new_zeros(length - len(cells), cells.shape[1])
        parts.append(torch.cat([cells, unread]))
    return torch.cat([shown.new_zeros(0, grid.freq * grid.patch_freq), *parts])


def mel_rows(plan: MaskPlan) -> Tensor:
    """Return (M,) int64: the row of the token grid, from the lowest mel bins up, of each masked token."""
    layout = plan.layout
    first = layout.cu_tokens.long()
    masked = plan.masked.long()
    clip = torch.searchsorted(first, masked, right=True) - 1
    token = masked - first.index_select(0, clip)
    if layout.grid.order == "time":
        return token % layout.grid.freq
    return token // ((first[1:] - first[:-1]) // layout.grid.freq).index_select(0, clip)


def _shape(grid: TokenGrid) -> tuple[int, int]:
    if grid.order == "time":
        return grid.patch_time, grid.patch_freq
    return grid.patch_freq, grid.patch_time


def _grid(grid: TokenGrid) -> dict[str, Any]:
    return {
        "freq": grid.freq,
        "patch_freq": grid.patch_freq,
        "patch_time": grid.patch_time,
        "order": grid.order,
    }
