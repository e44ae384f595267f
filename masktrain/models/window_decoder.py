# SPDX-License-Identifier: Apache-2.0
"""AudioMAE's decoder: blocks whose attention stays inside windows of 4 columns x 4 rows of the token grid.

Huang et al., "Masked Autoencoders that Listen", NeurIPS 2022; facebookresearch/AudioMAE:timm_patch/
swin_transformer.py, a Swin Transformer V2 (Liu et al., CVPR 2022). Odd blocks cut the windows two columns later
than even ones. A block is x + LN(attention(x)), then x + LN(mlp(x)).

Rows are ordered once, by (window of rows, column of the batch, row within the window). Then every window of either
cut is a run of consecutive rows: 4 columns are a run of 16, the 2 at an edge of a shifted clip one of 8. So a shift
is another list of cuts, and nothing is rolled, partitioned or merged. A clip of any number of columns has smaller
windows at its end. The reference knows 64 x 8 tokens only; where its shift wraps around, it masks the other end's
keys by -100, which for any tau that is not near its least value of 0.01 leaves them a weight of 0.

Dropout sites, of block l, from the decoder's base number on (masktrain/models/transformer.py): 8 (l + 1) + 0 the
hidden values of the position bias, 8 (l + 1) + 1 the bias. Their rows are the pairs of places in a window, the same
for all clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masktrain.kernels.dropout import dropout
from masktrain.kernels.window_attention import window_attention
from masktrain.models.positions import clip_of, grid_coordinates
from masktrain.models.transformer import linear_init
from masktrain.types import StepKey, TokenGrid, TokenLayout

WINDOW = 4
SHIFT = 2
POSITION_HIDDEN = 384
"""Hidden width of the network that gives the position bias."""


@dataclass(frozen=True, kw_only=True)
class WindowDecoderConfig:
    """base: the first dropout site. position_dropout: of the network of the position bias, after each of its two
    layers. eps: of every LayerNorm. window_rows: rows of a window, at most 4."""

    layers: int
    width: int
    ffn_width: int
    heads: int
    window_rows: int
    position_dropout: float
    base: int
    eps: float


def window_rows(grid: TokenGrid) -> int:
    """Return the rows of a window: 4, or all where the grid has fewer."""
    return min(WINDOW, grid.freq)


def window_flops(
    columns: tuple[int, ...], grid: TokenGrid, config: WindowDecoderConfig, kept: int
) -> tuple[int, int]:
    """Return the forward operations of a decoder whose last block returns `kept` rows, for clips of these columns; and
    those among them whose input has no gradient: the first layer of the position bias."""
    rows = grid.freq * sum(columns)
    full, rest = divmod(grid.freq, config.window_rows)
    heights = full * config.window_rows**2 + rest**2
    pairs = (WINDOW * config.window_rows) ** 2
    first = 2 * pairs * 2 * POSITION_HIDDEN
    total = 0
    for layer in range(config.layers):
        behind = kept if layer == config.layers - 1 else rows
        total += 2 * rows * 3 * config.width**2
        total += 2 * behind * (config.width**2 + 2 * config.width * config.ffn_width)
        squares = sum(n * n for c in columns for n in window_columns(c, layer % 2 == 1))
        total += 4 * config.width * heights * squares
        total += first + 2 * pairs * POSITION_HIDDEN * config.heads
    return total, first * config.layers


def position_values(config: WindowDecoderConfig) -> int:
    """Return the values that a block keeps for its position bias: hidden ones before and after dropout, and the bias."""
    pairs = (WINDOW * config.window_rows) ** 2
    hidden = POSITION_HIDDEN * (2 if config.position_dropout else 1)
    return pairs * (hidden + config.heads)


def window_columns(columns: int, shifted: bool) -> list[int]:
    """Return the columns of each window of a clip. A clip of one window is not shifted."""
    cut = [SHIFT] if shifted and columns > WINDOW else []
    left = columns - sum(cut)
    return cut + [WINDOW] * (left // WINDOW) + ([left % WINDOW] if left % WINDOW else [])


def window_counts(columns: tuple[int, ...], shifted: bool) -> tuple[int, ...]:
    """Return into how many windows the columns of each clip are cut."""
    return tuple(len(window_columns(c, shifted)) for c in columns)


class Windows:
    """The order of the rows of a batch, and its cuts into windows.

    Of a grid whose rows are no multiple of 4, the last window of rows is lower: its rows are the last of all.
    """

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout
        self.height = window_rows(layout.grid)
        self.full, self.rest = divmod(layout.grid.freq, self.height)
        self.columns = sum(layout.columns)
        cu_columns = layout.cu_tokens.long() // layout.grid.freq
        self.cu_columns = cu_columns
        self.cuts = tuple(self._cuts(shifted) for shifted in (False, True))

    def _cuts(self, shifted: bool) -> Tensor:
        """Return (n + 1,) int64: the first column of every window, and the end."""
        counts = window_counts(self.layout.columns, shifted)
        columns = self.cu_columns[1:] - self.cu_columns[:-1]
        shift = (columns > WINDOW) * SHIFT if shifted else torch.zeros_like(columns)
        windows = (columns + shift + WINDOW - 1) // WINDOW
        clip = torch.repeat_interleave(windows, output_size=sum(counts))
        number = torch.arange(sum(counts), device=clip.device)
        number = number - (windows.cumsum(0) - windows).index_select(0, clip)
        first = (WINDOW * number - shift.index_select(0, clip)).clamp(min=0)
        return torch.cat([self.cu_columns.index_select(0, clip) + first, self.cu_columns[-1:]])

    def rows(self) -> Tensor:
        """Return (N,) int64: the row of every token."""
        outer, inner = grid_coordinates(self.layout)
        column, row = (outer, inner) if self.layout.grid.order == "time" else (inner, outer)
        column = column + self.cu_columns.index_select(0, clip_of(self.layout))
        band, place = row // self.height, row % self.height
        height = torch.where(band < self.full, self.height, self.rest) if self.rest else self.height
        return band * (self.height * self.columns) + column * height + place

    def cu_rows(self, shifted: bool) -> Tensor:
        """Return (W + 1,) int32: the first row of every window of full height, and the end."""
        cuts = self.cuts[shifted]
        bands = torch.arange(self.full, device=cuts.device)[:, None] * self.columns
        return (torch.cat([(bands + cuts[:-1]).flatten(), cuts[-1:] * self.full]) * self.height).int()

    def attend(self, qkv: Tensor, tau: Tensor, bias: Tensor, shifted: bool) -> Tensor:
        """qkv: (N, 3, H, Dh), rows in this order. bias: (H, S, S), S = 4 columns x rows of a window. Returns
        (N, H, Dh)."""
        cu = self.cu_rows(shifted)
        if not self.rest:
            return window_attention(qkv, tau, bias, cu)
        split = self.full * self.height * self.columns
        low = bias.unflatten(2, (WINDOW, self.height)).unflatten(1, (WINDOW, self.height))
        low = low[:, :, : self.rest, :, : self.rest].flatten(3, 4).flatten(1, 2)
        upper = window_attention(qkv[:split], tau, bias, cu)
        lower = window_attention(qkv[split:], tau, low, (self.cuts[shifted] * self.rest).int())
        return torch.cat([upper, lower])


def position_offsets(height: int) -> Tensor:
    """Return (S * S, 2) float32: sign(d) ln(1 + |d|) of the difference in columns and in rows of every pair of
    places in a window, whose place is column * height + row."""
    place = torch.arange(WINDOW * height)
    at = torch.stack([place // height, place % height], dim=1)
    offsets = (at[:, None] - at[None, :]).flatten(0, 1).float()
    return offsets.sign() * torch.log1p(offsets.abs())


class WindowBlock(nn.Module):
    """Attention and feed-forward part of one layer."""

    def __init__(self, config: WindowDecoderConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.shifted = layer % 2 == 1
        self.site = config.base + 8 * (layer + 1)
        self.tau = nn.Parameter(torch.ones(config.heads))
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.position_fc1 = nn.Linear(2, POSITION_HIDDEN)
        self.position_fc2 = nn.Linear(POSITION_HIDDEN, config.heads)
        self.attention_norm = nn.LayerNorm(config.width, config.eps)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)
        self.ffn_norm = nn.LayerNorm(config.width, config.eps)

    def forward(
        self, x: Tensor, windows: Windows, offsets: Tensor, key: StepKey | None, keep: Tensor | None
    ) -> Tensor:
        """x: (N, width). offsets: see position_offsets. key: None for no dropout. keep: (K,) the rows to return;
        None: all."""
        config = self.config
        qkv = self.qkv(x).unflatten(1, (3, config.heads, config.width // config.heads))
        attended = windows.attend(qkv, self.tau, self.position_bias(offsets, key), self.shifted).flatten(1)
        if keep is not None:
            x, attended = x.index_select(0, keep), attended.index_select(0, keep)
        x = x + self.attention_norm(self.out(attended))
        return x + self.ffn_norm(self.fc2(F.gelu(self.fc1(x))))

    def position_bias(self, offsets: Tensor, key: StepKey | None) -> Tensor:
        """Return (heads, S, S) in the dtype of the weights."""
        with torch.autocast(offsets.device.type, enabled=False):
            hidden = self._drop(F.relu(self.position_fc1(offsets)), key, self.site)
            bias = self._drop(self.position_fc2(hidden), key, self.site + 1)
        places = WINDOW * self.config.window_rows
        return bias.t().unflatten(1, (places, places))

    def _drop(self, x: Tensor, key: StepKey | None, site: int) -> Tensor:
        if key is None or self.config.position_dropout == 0:
            return x
        pairs = torch.arange(len(x), device=x.device)
        return dropout(
            x, self.config.position_dropout, key.counter, torch.zeros_like(pairs), pairs, site=site
        )


class WindowDecoder(nn.Module):
    """Blocks in windows, and a LayerNorm at the end."""

    offsets: Tensor

    def __init__(self, config: WindowDecoderConfig) -> None:
        """Matrices are drawn Xavier-uniform, biases 0, tau 1."""
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.blocks = nn.ModuleList(WindowBlock(config, layer) for layer in range(config.layers))
        self.register_buffer("offsets", position_offsets(config.window_rows), persistent=False)
        self.apply(linear_init(nn.init.xavier_uniform_))

    def forward(self, x: Tensor, windows: Windows, key: StepKey | None, keep: Tensor | None = None) -> Tensor:
        """x: (N, width), rows in the order of `windows`. key: None for no dropout. keep: (K,) the rows to return;
        None: all."""
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            x = block(x, windows, self.offsets, key, keep if layer == last else None)
        return self.norm(x)
