# SPDX-License-Identifier: Apache-2.0
"""MaskSpec: a masked autoencoder of 32 kHz spectrograms with a ViT encoder in three sizes.

Chong et al., "Masked Spectrogram Prediction For Self-Supervised Audio Pre-Training", ICASSP 2023; code
WangHelin1997/MaskSpec at 6fb50a1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from masktrain.data.config import DataConfig
from masktrain.frontend.presets import preset
from masktrain.masking.strategies import RandomMasking
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae import MaeConfig
from masktrain.objectives.reconstruction import ReconstructionConfig
from masktrain.training.optim import OptimConfig
from masktrain.training.recipe import Recipe, TokenConfig
from masktrain.training.schedule import ScheduleConfig

_MODEL = "WangHelin1997/MaskSpec:models/models_mae.py"
_MAIN = "WangHelin1997/MaskSpec:trainer/main_pretrain.py"
_SCRIPT = "WangHelin1997/MaskSpec:scripts/pretrain_vit.sh"
_DATASET = "WangHelin1997/MaskSpec:audioset/dataset.py"
_PAPER = "the paper, section 3"
_SOURCES = (
    ("batch_size", f"{_SCRIPT}: 8 GPUs x 64"),
    ("frontend", f"{_MODEL}: AugmentMelSTFT, after kkoutini/PaSST:models/preprocess.py"),
    ("data.clip_seconds", _DATASET),
    ("data.target_length", f"{_MODEL}: 128 x 992"),
    ("tokens", f"{_MODEL}: PatchEmbed of 16 x 16, flattened row by row"),
    ("input_norm.kind", f"{_MODEL}: mean_std_128.npy"),
    ("input_norm.measured_clips", "WangHelin1997/MaskSpec:audioset/get_mean_std.py"),
    ("input_norm.factor", _MODEL),
    ("input_norm.std_floor", "this project"),
    ("masking", "the paper: 75 % did best"),
    ("model.encoder_layers", f"{_MODEL}, and the paper's table of sizes"),
    ("model.embed_dim", "the paper's table of sizes"),
    ("model.heads", "the paper's table of sizes"),
    ("model.ffn_dim", f"{_MODEL}: mlp_ratio 4"),
    ("model.decoder_layers", _PAPER),
    ("model.decoder_embed_dim", _PAPER),
    ("model.decoder_ffn_dim", _PAPER),
    ("model.decoder_heads", _PAPER),
    ("model.cls_token", _MODEL),
    ("model.key_bias", f"{_MODEL}: timm's block"),
    ("model.positions", "WangHelin1997/MaskSpec:utils/pos_embed.py"),
    ("model.decoder_positions", "WangHelin1997/MaskSpec:utils/pos_embed.py"),
    ("objective.norm_pix_loss", _SCRIPT),
    ("optim", _MAIN),
    ("optim.clip_norm", "WangHelin1997/MaskSpec:utils/misc.py: the norm is only measured"),
    ("schedule.kind", "WangHelin1997/MaskSpec:utils/lr_sched.py"),
    ("schedule.warmup_steps", "the paper: 40 epochs"),
    ("schedule.total_steps", "the paper: 80 epochs"),
)

# AudioSet as the code's data preparation found it: the clips of an epoch.
CLIPS = 1_930_000
EPOCHS, WARMUP_EPOCHS = 80, 40
# The size sets model, batch and learning rate together; nothing else changes. The published one: blr 1e-3.
BATCH_SIZE = {"tiny": 32, "small": 128, "base": 512}
LEARNING_RATE: dict[str, dict[str, Any]] = {
    "tiny": {"lr": 1e-3},
    "small": {"lr": 5e-4},
    "base": {"blr": 1e-3},
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
        "decoder_layers": 4,
        "decoder_embed_dim": 256,
        "decoder_ffn_dim": 1024,
        "decoder_heads": 8,
    },
    "base": {},
}


def maskspec(size: str = "base") -> Recipe:
    """16 x 16 patches of 128 mel bins at 32 kHz, 75 % masked at random; encoder 12 x 768, decoder 8 x 512."""
    steps = CLIPS // BATCH_SIZE["base"]
    return Recipe(
        name="maskspec",
        size=size,
        paper="Chong et al., Masked Spectrogram Prediction For Self-Supervised Audio Pre-Training, ICASSP 2023",
        code="WangHelin1997/MaskSpec at 6fb50a1",
        readings=(
            "window: Hann of 800 samples in an FFT of 1024, as the code; the paper names Hamming of 1024 "
            "(--frontend.mel.window hamming --frontend.mel.win-length 1024)",
            "fmin, fmax: drawn anew in each training step (0 to 9 Hz, 14001 to 16000 Hz), as the code's mel module "
            "does in training mode; the paper names none (--frontend.fmin-jitter 0 --frontend.fmax-jitter 0)",
            "ffn_dim: 3072, as the code; the paper's 2048 does not give its 86 M parameters",
            "batch_size and blr: 512 clips at 1e-3 x 512 / 256 = 2e-3, as the code's rule; the paper's 1e-3 is read "
            "as the base rate",
            "schedule: 80 epochs with 40 of warm-up, as the paper; the code's default is a horizon of 400, which its "
            "fine-tuning scripts suggest was stopped near 80 (--schedule.total-steps); an epoch is 1.93 M clips",
            "norm_pix_loss: on, as the code's script; the paper names no target normalisation "
            "(--objective.no-norm-pix-loss). The loss is a mean; the paper writes a sum",
            "cls_token: one, as the code; the paper has none (--model.no-cls-token)",
            "mask token: of the decoder's width, as the code; the paper writes the encoder's",
            "input_norm: per mel bin, measured on the training set, as the code; the standard deviation is at least "
            "std_floor, since the published file has 0.043 in the top bins, which an MP3 encoder had emptied. "
            "Measured without the jitter of the mel edges",
            "clips: 10 s, packed without padding; the code keeps the first 10 s and fills shorter clips with silence "
            "(--data.crop start --data.padding silence)",
            "tokens: frames beyond a multiple of 16 are dropped, as the code crops 1000 frames to 992",
            "weight_decay: on matrices and on class and mask token, as the code's parameter groups come out",
            "min_lr: 0",
        ),
        sources=_SOURCES,
        batch_size=BATCH_SIZE[size],
        frontend=preset("maskspec"),
        data=DataConfig(clip_seconds=10.0, target_length=992),
        tokens=TokenConfig(patch_freq=16, patch_time=16, order="freq", partial="drop"),
        input_norm=InputNormConfig(kind="per_bin", factor=1.0),
        masking=RandomMasking(mask_ratio=0.75),
        model=MaeConfig(**MODEL[size]),
        objective=ReconstructionConfig(norm_pix_loss=True),
        optim=OptimConfig(kind="adamw", **LEARNING_RATE[size], betas=(0.9, 0.95), weight_decay=0.05),
        schedule=ScheduleConfig(
            kind="cosine", warmup_steps=WARMUP_EPOCHS * steps, total_steps=EPOCHS * steps
        ),
    )


def maskspec_small(size: str = "base") -> Recipe:
    """maskspec with the published small encoder, 12 x 384; the decoder stays 8 x 512."""
    return _encoder(maskspec(size), "maskspec_small", width=384, heads=6)


def maskspec_tiny(size: str = "base") -> Recipe:
    """maskspec with the published tiny encoder, 12 x 192; the decoder stays 8 x 512."""
    return _encoder(maskspec(size), "maskspec_tiny", width=192, heads=3)


def _encoder(recipe: Recipe, name: str, width: int, heads: int) -> Recipe:
    """Return the recipe with another encoder in its published size; the smaller named sizes have their own."""
    model = recipe.model
    assert isinstance(model, MaeConfig)
    if recipe.size == "base":
        model = replace(model, embed_dim=width, ffn_dim=4 * width, heads=heads)
    return replace(recipe, name=name, model=model)
