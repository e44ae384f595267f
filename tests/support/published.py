# SPDX-License-Identifier: Apache-2.0
"""State dicts with the names and shapes that the reference projects publish, written out here and filled with noise;
their fixed tables are computed here, from the formulas."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def sincos(width: int, numbers: np.ndarray) -> np.ndarray:
    """Return (N, width) float64: all sines, then all cosines, of numbers (N,) times 10000^(-2 i / width)."""
    angles = numbers[:, None] / 10000.0 ** (np.arange(width // 2) / (width / 2.0))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def grid_table(width: int, height: int, length: int, leading: int = 1) -> Tensor:
    """Return (1, leading + height length, width): rows of zeros, then token n at (n // length, n % length), the
    second number in the first half of the channels (facebookresearch/mae:util/pos_embed.py)."""
    n = np.arange(height * length)
    table = np.concatenate([sincos(width // 2, n % length), sincos(width // 2, n // length)], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros((leading, width)), table])).float()[None]


def interleaved(length: int, width: int, dtype: torch.dtype, leading: int = 0) -> Tensor:
    """Return (1, leading + length, width): sines in even columns, cosines in odd ones."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=dtype) * (-np.log(10000.0) / width))
    angles = torch.arange(length, dtype=dtype)[:, None] * rates
    table = torch.zeros(leading + length, width)
    table[leading:, 0::2], table[leading:, 1::2] = angles.sin(), angles.cos()
    return table[None]


def _vit_blocks(prefix: str, width: int, depth: int, q_bias: bool = False) -> Shapes:
    out: Shapes = {}
    for i in range(depth):
        b = f"{prefix}.{i}"
        for norm in ("norm1", "norm2"):
            out |= {f"{b}.{norm}.weight": (width,), f"{b}.{norm}.bias": (width,)}
        out[f"{b}.attn.qkv.weight"] = (3 * width, width)
        if q_bias:
            out |= {f"{b}.attn.q_bias": (width,), f"{b}.attn.v_bias": (width,)}
        else:
            out[f"{b}.attn.qkv.bias"] = (3 * width,)
        out |= {f"{b}.attn.proj.weight": (width, width), f"{b}.attn.proj.bias": (width,)}
        out |= {f"{b}.mlp.fc1.weight": (4 * width, width), f"{b}.mlp.fc1.bias": (4 * width,)}
        out |= {f"{b}.mlp.fc2.weight": (width, 4 * width), f"{b}.mlp.fc2.bias": (width,)}
    return out


def _window_blocks(prefix: str, width: int, depth: int) -> Shapes:
    out = _vit_blocks(prefix, width, depth)
    for i in range(depth):
        a = f"{prefix}.{i}.attn"
        out |= {f"{a}.tau": (16,), f"{a}.meta_mlp.fc1.weight": (384, 2), f"{a}.meta_mlp.fc1.bias": (384,)}
        out |= {f"{a}.meta_mlp.fc2.weight": (16, 384), f"{a}.meta_mlp.fc2.bias": (16,)}
    return out


def _mae(
    width: int, depth: int, decoder_width: int, decoder_depth: int, q_bias: bool = False, window: bool = False
) -> Shapes:
    blocks = _window_blocks if window else _vit_blocks
    decoder = (
        blocks("decoder_blocks", decoder_width, decoder_depth)
        if window
        else _vit_blocks("decoder_blocks", decoder_width, decoder_depth, q_bias)
    )
    return {
        "cls_token": (1, 1, width),
        "mask_token": (1, 1, decoder_width),
        "patch_embed.proj.weight": (width, 1, 16, 16),
        "patch_embed.proj.bias": (width,),
        **_vit_blocks("blocks", width, depth, q_bias),
        "norm.weight": (width,),
        "norm.bias": (width,),
        "decoder_embed.weight": (decoder_width, width),
        "decoder_embed.bias": (decoder_width,),
        **decoder,
        "decoder_norm.weight": (decoder_width,),
        "decoder_norm.bias": (decoder_width,),
        "decoder_pred.weight": (256, decoder_width),
        "decoder_pred.bias": (256,),
    }


def _noise(shapes: Shapes) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def maskspec(width: int = 768, depth: int = 12, decoder_depth: int = 8) -> dict[str, Tensor]:
    """128 mel bins x 992 frames."""
    tables = {"pos_embed": grid_table(width, 8, 62), "decoder_pos_embed": grid_table(512, 8, 62)}
    return _noise(_mae(width, depth, 512, decoder_depth)) | tables


def msm_mae(width: int = 768, depth: int = 12, decoder_depth: int = 4) -> dict[str, Tensor]:
    """80 mel bins x 608 frames, of the M2D repository."""
    tables = {"pos_embed": grid_table(width, 5, 38), "decoder_pos_embed": grid_table(384, 5, 38)}
    stats = {"norm_stats": torch.tensor([-7.0437, 3.9112])}
    return _noise(_mae(width, depth, 384, decoder_depth)) | tables | stats


def msm_mae_orig(width: int = 768, depth: int = 12) -> dict[str, Tensor]:
    """80 mel bins x 208 frames; no bias of the keys, decoder positions over the token's number."""
    tables = {"pos_embed": grid_table(width, 5, 13)}
    tables["decoder_pos_embed"] = interleaved(65, 384, torch.float64, leading=1)
    return _noise(_mae(width, depth, 384, 4, q_bias=True)) | tables


def audiomae(width: int = 768, depth: int = 12) -> dict[str, Tensor]:
    """1024 frames x 128 mel bins: 64 x 8 tokens with the positions of 8 x 64; window decoder."""
    tables = {"pos_embed": grid_table(width, 8, 64), "decoder_pos_embed": grid_table(512, 8, 64)}
    return _noise(_mae(width, depth, 512, 16, window=True)) | tables


def ssast(width: int = 768, depth: int = 12, frame: bool = False) -> dict[str, Tensor]:
    """128 mel bins x 1024 frames, as saved out of DataParallel."""
    shapes: Shapes = {
        "mask_embed": (1, 1, width),
        "v.cls_token": (1, 1, width),
        "v.dist_token": (1, 1, width),
        "v.pos_embed": (1, 514, width),
        "v.patch_embed.proj.weight": (width, 1, 128, 2) if frame else (width, 1, 16, 16),
        "v.patch_embed.proj.bias": (width,),
        **_vit_blocks("v.blocks", width, depth),
        "v.norm.weight": (width,),
        "v.norm.bias": (width,),
    }
    for head in ("v.head", "v.head_dist"):
        shapes |= {f"{head}.weight": (1000, width), f"{head}.bias": (1000,)}
    for head in ("cpredlayer", "gpredlayer"):
        shapes |= {f"{head}.0.weight": (width, width), f"{head}.0.bias": (width,)}
        shapes |= {f"{head}.2.weight": (256, width), f"{head}.2.bias": (256,)}
    state = _noise(shapes) | {"p_input_fdim": torch.tensor(128), "p_input_tdim": torch.tensor(1024)}
    return {f"module.{name}": tensor for name, tensor in state.items()}


def mae_ast(width: int = 768, depth: int = 12, rows: int = 48_000) -> dict[str, Tensor]:
    """128 mel bins; patches and pairs of frames have 256 values each."""
    shapes: Shapes = {
        "encoder_mask_emb": (width,),
        "decoder_mask_emb": (width,),
        "post_extract_proj.weight": (width, 256),
        "post_extract_proj.bias": (width,),
        "layer_norm.weight": (128,),
        "layer_norm.bias": (128,),
        "batch_norm.running_mean": (1,),
    }
    for stack, layers in (("encoder", depth), ("decoder", 2)):
        for i in range(layers):
            b = f"{stack}.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= {
                    f"{b}.self_attn.{part}.weight": (width, width),
                    f"{b}.self_attn.{part}.bias": (width,),
                }
            for norm in ("self_attn_layer_norm", "final_layer_norm"):
                shapes |= {f"{b}.{norm}.weight": (width,), f"{b}.{norm}.bias": (width,)}
            shapes |= {f"{b}.fc1.weight": (4 * width, width), f"{b}.fc1.bias": (4 * width,)}
            shapes |= {f"{b}.fc2.weight": (width, 4 * width), f"{b}.fc2.bias": (width,)}
        shapes |= {f"{stack}.layer_norm.weight": (width,), f"{stack}.layer_norm.bias": (width,)}
    for head in ("final_proj_reconstruction", "final_proj_classification"):
        shapes |= {f"{head}.weight": (256, width), f"{head}.bias": (256,)}
    table = interleaved(rows, width, torch.float32)
    return _noise(shapes) | {
        "batch_norm.running_var": torch.tensor([19.0]),
        "batch_norm.num_batches_tracked": torch.tensor(550_000),
        "enc_sine_pos_embed.pe": table,
        "dec_sine_pos_embed.pe": table.clone(),
    }
