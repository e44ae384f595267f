# SPDX-License-Identifier: Apache-2.0
"""AudioMAE: a masked autoencoder of spectrograms whose decoder attends in shifted windows.

Huang et al., "Masked Autoencoders that Listen", NeurIPS 2022; code facebookresearch/AudioMAE at bd60e29.
"""

from __future__ import annotations

from typing import Any

from masktrain.data.augment import AugmentConfig
from masktrain.data.config import DataConfig
from masktrain.frontend.presets import preset, published_norm
from masktrain.masking.strategies import RandomMasking
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae import MaeConfig
from masktrain.objectives.reconstruction import ReconstructionConfig
from masktrain.training.optim import OptimConfig
from masktrain.training.recipe import Recipe, TokenConfig
from masktrain.training.schedule import ScheduleConfig

CLIPS = 1_930_000  # of AudioSet in an epoch
EPOCHS, WARMUP_EPOCHS = 33, 3
# The size sets model, batch and learning rate together; nothing else changes. The published one: 2e-4 x 512 / 256.
BATCH_SIZE = {"tiny": 32, "small": 128, "base": 512}
LEARNING_RATE: dict[str, dict[str, Any]] = {
    "tiny": {"lr": 1e-3},
    "small": {"lr": 5e-4},
    "base": {"blr": 2e-4},
}
MODEL: dict[str, dict[str, Any]] = {
    "tiny": {
        "encoder_layers": 6,
        "embed_dim": 128,
        "ffn_dim": 512,
        "heads": 4,
        "decoder_layers": 2,
        "decoder_embed_dim": 128,
        "decoder_ffn_dim": 512,
        "decoder_heads": 4,
    },
    "small": {
        "embed_dim": 384,
        "ffn_dim": 1536,
        "heads": 6,
        "decoder_layers": 8,
        "decoder_embed_dim": 256,
        "decoder_ffn_dim": 1024,
        "decoder_heads": 8,
    },
    "base": {"decoder_layers": 16},
}


def audiomae(size: str = "base") -> Recipe:
    """128 mel bins in 16 x 16 patches, 80 % masked at random; encoder 12 x 768, decoder 16 x 512 in 4 x 4 windows."""
    steps = CLIPS // BATCH_SIZE["base"]
    norm = published_norm("audiomae")
    return Recipe(
        name="audiomae",
        size=size,
        paper="Huang et al., Masked Autoencoders that Listen, NeurIPS 2022",
        code="facebookresearch/AudioMAE at bd60e29",
        readings=(
            "decoder_layers: 16, as the code builds its window decoder whatever decoder_depth says; its global decoder "
            "has 8 (--model.decoder global --model.decoder-layers 8)",
            "positions: the token's own column and row; the code swaps the two extents of the grid, and published "
            "weights have seen that (--model.positions sincos_2d_transposed --model.decoder-positions "
            "sincos_2d_transposed)",
            "decoder: windows of 4 x 4 tokens, every second block shifted by 2 columns and not along frequency, as the "
            "code; the windows that a shift leaves at the edges are smaller, where the code masks by -100",
            "position_dropout: 0.1 after both layers of the position bias, as the code (--model.position-dropout)",
            "cosine: q k / max(|q| |k|, 1e-6), as the code; Swin Transformer V2 names no least norm",
            "batch_size and blr: 512 clips (64 GPUs x 8) at 2e-4 x 512 / 256 = 4e-4, 33 epochs with 3 of warm-up, "
            "weight decay 1e-4, as the code's submission script; its argument defaults (1e-3, 400 epochs, 40, 0.05) "
            "are not what was published, and the script that its README names is not there",
            "schedule: an epoch is 1.93 M clips, what AudioSet still had; the code's number of steps follows its list "
            "of files",
            "augment: gain alone, as what the code does: its roll reads the number of channels for the length of the "
            "clip and rolls by 0 (--augment.roll rolls)",
            "clips: 10 s are 998 frames or 62 columns (6 frames are left over), packed without padding; the "
            "code adds 26 frames of the log-mel value 0, louder than silence, for 64 columns (--data.padding "
            "reference), and keeps the first 10 s of longer files (--data.crop start)",
            "tokens: a last column counts if at least half of it is there, the rest being 0 after normalisation",
            "norm_pix_loss: on, as the code's script sets it",
            "masking: at random, as published; whole columns and rows (--masking time_frequency) are the code's other "
            "choice",
            "clip_norm: none, as the code",
            "weight_decay: on matrices and on class and mask token, as the code's parameter groups come out",
        ),
        batch_size=BATCH_SIZE[size],
        frontend=preset("audiomae"),
        data=DataConfig(clip_seconds=10.0, target_length=1024),
        augment=AugmentConfig(gain=True),
        tokens=TokenConfig(patch_freq=16, patch_time=16, order="time", partial="half"),
        input_norm=InputNormConfig(
            kind="global", factor=0.5, dataset_mean=norm.dataset_mean, dataset_std=norm.dataset_std
        ),
        masking=RandomMasking(mask_ratio=0.8),
        model=MaeConfig(decoder="window", **MODEL[size]),
        objective=ReconstructionConfig(norm_pix_loss=True),
        optim=OptimConfig(kind="adamw", **LEARNING_RATE[size], betas=(0.9, 0.95), weight_decay=1e-4),
        schedule=ScheduleConfig(
            kind="cosine", warmup_steps=WARMUP_EPOCHS * steps, total_steps=EPOCHS * steps
        ),
    )
