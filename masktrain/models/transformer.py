# SPDX-License-Identifier: Apache-2.0
"""A stack of transformer blocks over packed clips of any length.

The block is fairseq's TransformerSentenceEncoderLayer as AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py
has it, with LayerNorm after (norm "post") or before (norm "pre") each half.

Dropout sites. Each stack has a base number; every place that drops has its own:

| site | drops |
| --- | --- |
| base + 0 | rows that enter the stack |
| base + 8 (l + 1) + 0 | attention weights of layer l |
| base + 8 (l + 1) + 1 | output of the attention of layer l |
| base + 8 (l + 1) + 2 | hidden values of the feed-forward part of layer l |
| base + 8 (l + 1) + 3 | output of the feed-forward part of layer l |

Layers are dropped on the host, by the word of (seed, step) with stream = base and id = l.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masktrain.kernels.dropout import dropout
from masktrain.kernels.philox import Purpose, host_words
from masktrain.kernels.varlen_attention import varlen_attention
from masktrain.types import StepKey

# Sites of one stack: 8 for its input and 8 for each of up to 511 layers.
STACK_SITES = 4096


@dataclass(frozen=True)
class Rows:
    """The rows of packed clips. cu: (B+1,) int32, lengths: rows of each clip on the host. clip_ids: (B,)
    int64. ids, positions: (N,) int64, each row's clip id and its number within its clip, which key dropout."""

    cu: Tensor
    lengths: tuple[int, ...]
    clip_ids: Tensor
    ids: Tensor
    positions: Tensor

    def at(self, keep: Tensor) -> Rows:
        """Return the rows `keep` (K,), for dropout: attention needs them all."""
        return replace(
            self, ids=self.ids.index_select(0, keep), positions=self.positions.index_select(0, keep)
        )


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """One stack. base: the first of its STACK_SITES dropout sites. eps: of every LayerNorm. init: of the
    matrices: "bert" N(0, 0.02), "xavier" uniform (facebookresearch/mae:models_mae.py), "trunc_normal" N(0, 0.02)
    cut at +-2 (timm's DeiT). key_bias: q, k and v have a bias, or q and v alone (BEiT, MSM-MAE); the softmax does
    not see a bias of k, so that this is a matter of which parameters there are."""

    layers: int
    width: int
    ffn_width: int
    heads: int
    norm: Literal["post", "pre"]
    dropout: float
    attention_dropout: float
    activation_dropout: float
    layerdrop: float
    base: int
    eps: float = 1e-5
    init: Literal["bert", "xavier", "trunc_normal"] = "bert"
    key_bias: bool = True


class KeylessQkv(nn.Module):
    """q, k and v from one matrix product, with a bias of q and v alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, width). Returns (N, 3 width)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.linear.weight, bias)


class Block(nn.Module):
    """Attention and feed-forward part of one layer; q, k and v come from one matrix product."""

    def __init__(self, config: StackConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.site = config.base + 8 * (layer + 1)
        self.qkv: nn.Module = (
            nn.Linear(config.width, 3 * config.width) if config.key_bias else KeylessQkv(config.width)
        )
        self.out = nn.Linear(config.width, config.width)
        self.attention_norm = nn.LayerNorm(config.width, config.eps)
        self.fc1 = nn.Linear(config.width, config.ffn_width)
        self.fc2 = nn.Linear(config.ffn_width, config.width)
        self.ffn_norm = nn.LayerNorm(config.width, config.eps)

    def forward(self, x: Tensor, rows: Rows, key: StepKey | None, keep: Tensor | None = None) -> Tensor:
        """x: (N, width). key: None for no dropout. keep: (K,) the rows to return; None: all.

        What is behind the attention works on a row alone, and is done for the rows of `keep` only.
        """
        pre = self.config.norm == "pre"
        attended = self._attend(self.attention_norm(x) if pre else x, rows, key)
        if keep is not None:
            x, attended, rows = x.index_select(0, keep), attended.index_select(0, keep), rows.at(keep)
        x = x + drop(self.out(attended), self.config.dropout, rows, key, self.site + 1)
        if pre:
            return x + self._feed(self.ffn_norm(x), rows, key)
        x = self.attention_norm(x)
        return self.ffn_norm(x + self._feed(x, rows, key))

    def _attend(self, x: Tensor, rows: Rows, key: StepKey | None) -> Tensor:
        """Return the heads' outputs side by side, before they are mixed: (N, width)."""
        config = self.config
        q, k, v = self.qkv(x).unflatten(1, (3, config.heads, config.width // config.heads)).unbind(1)
        return varlen_attention(
            q,
            k,
            v,
            rows.cu,
            rows.lengths,
            dropout_p=config.attention_dropout if key else 0.0,
            counter=key.counter if key else None,
            clip_ids=rows.clip_ids,
            site=self.site,
        ).flatten(1)

    def _feed(self, x: Tensor, rows: Rows, key: StepKey | None) -> Tensor:
        x = F.gelu(self.fc1(x))
        x = drop(x, self.config.activation_dropout, rows, key, self.site + 2)
        return drop(self.fc2(x), self.config.dropout, rows, key, self.site + 3)


class Stack(nn.Module):
    """Blocks with the LayerNorm of the stack: at its start (norm "post") or at its end (norm "pre")."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.apply(_INITS[config.init])

    def forward(self, x: Tensor, rows: Rows, key: StepKey | None, keep: Tensor | None = None) -> Tensor:
        """x: (N, width). key: None for no dropout and all layers. keep: (K,) the rows to return; None: all."""
        config = self.config
        if config.norm == "post":
            x = self.norm(x)
        x = drop(x, config.dropout, rows, key, config.base)
        active = self.active(key)
        for layer in active:
            x = self.blocks[layer](x, rows, key, keep if layer == active[-1] else None)
        if keep is not None and not active:
            x = x.index_select(0, keep)
        return self.norm(x) if config.norm == "pre" else x

    def outputs(self, x: Tensor, rows: Rows, layers: Collection[int]) -> dict[int, Tensor]:
        """Return the (N, width) output of each of the asked layers, counted from 1, without dropout.

        The last layer's has passed the norm at the end of the stack, if there is one; no layer behind the last asked
        one is computed.
        """
        if self.config.norm == "post":
            x = self.norm(x)
        found = {}
        for number in range(1, max(layers, default=0) + 1):
            x = self.blocks[number - 1](x, rows, None)
            if number in layers:
                last = number == self.config.layers
                found[number] = self.norm(x) if last and self.config.norm == "pre" else x
        return found

    def active(self, key: StepKey | None) -> tuple[int, ...]:
        """Return the layers that run in the step of `key`; all for None."""
        layers = range(self.config.layers)
        threshold = round(self.config.layerdrop * 2**32)
        if key is None or threshold == 0:
            return tuple(layers)
        words = (
            host_words(key.seed, key.step, layer, 1, purpose=Purpose.LAYERDROP, stream=self.config.base)[0]
            for layer in layers
        )
        return tuple(layer for layer, word in zip(layers, words, strict=True) if word >= threshold)


def drop(x: Tensor, p: float, rows: Rows, key: StepKey | None, site: int) -> Tensor:
    """Return x (N, D) with dropout, or x itself where there is none."""
    if key is None or p == 0:
        return x
    return dropout(x, p, key.counter, rows.ids, rows.positions, site=site)


def linear_init(weight: Callable[[Tensor], object]) -> Callable[[nn.Module], None]:
    """Return what draws the matrix of a linear layer with `weight` and sets its bias to 0; LayerNorm stays 1
    and 0."""

    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            weight(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    return init


_INITS: dict[str, Callable[[nn.Module], None]] = {
    "bert": linear_init(partial(nn.init.normal_, std=0.02)),
    "xavier": linear_init(nn.init.xavier_uniform_),
    "trunc_normal": linear_init(partial(nn.init.trunc_normal_, std=0.02)),
}
