# SPDX-License-Identifier: Apache-2.0
"""MSM-MAE: masked spectrogram modelling with a masked autoencoder on 80 mel bins.

Niizumi et al., "Masked Spectrogram Modeling using Masked Autoencoders for Learning General-purpose Audio
Representation", HEAR 2021 (PMLR 166); code nttcslab/msm-mae at f0c442f. `msm_mae` is the version of the same authors'
later work, nttcslab/m2d (MSM-MAE in "Rethinking masking strategies"); `msm_mae_orig` that of the paper.
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

_M2D = "nttcslab/m2d:patch_m2d.diff"
_LATER = "jstgermainsensortech/m2d:examples/MSM-MAE_Pretraining.md"
_LMS = "nttcslab/m2d:wav_to_lms.py"
_MAE = "facebookresearch/mae"
_SOURCES = (
    ("batch_size", _LATER),
    ("frontend", f"{_LMS}, with the defaults of nnAudio"),
    ("data.clip_seconds", f"{_LATER}: 80 x 608"),
    ("data.target_length", f"{_LATER}: 80 x 608"),
    ("tokens", "nttcslab/msm-mae: PatchEmbed of 16 x 16, flattened row by row"),
    ("input_norm", "nttcslab/m2d, the constant norm_stats of its checkpoints"),
    ("masking", "the paper: 75 %"),
    ("model.encoder_layers", f"{_MAE}: mae_vit_base"),
    ("model.embed_dim", f"{_MAE}: mae_vit_base"),
    ("model.ffn_dim", f"{_MAE}: mae_vit_base"),
    ("model.heads", f"{_MAE}: mae_vit_base"),
    ("model.decoder_layers", "nttcslab/msm-mae: msm_mae_vit_base"),
    ("model.decoder_embed_dim", "nttcslab/msm-mae: msm_mae_vit_base"),
    ("model.decoder_ffn_dim", "nttcslab/msm-mae: msm_mae_vit_base"),
    ("model.decoder_heads", "nttcslab/msm-mae: msm_mae_vit_base"),
    ("model.key_bias", f"{_M2D}: timm's block"),
    ("model.positions", f"{_MAE}:util/pos_embed.py"),
    ("model.decoder_positions", _M2D),
    ("objective.norm_pix_loss", "jstgermainsensortech/m2d:patch_m2d.diff, mae_train_audio"),
    ("optim", _M2D),
    ("schedule", f"{_LATER}: 20 of 300 epochs"),
)
_ORIGINAL = "nttcslab/msm-mae:patch_main.diff"
_ORIGINAL_SOURCES = {
    "batch_size": _ORIGINAL,
    "frontend": "nttcslab/msm-mae:wav_to_lms.py, with the defaults of nnAudio",
    "data.clip_seconds": "nttcslab/msm-mae: 80 x 208",
    "data.target_length": "nttcslab/msm-mae: 80 x 208",
    "model.key_bias": "nttcslab/msm-mae:patch_msm_mae.diff",
    "model.decoder_positions": "nttcslab/msm-mae:patch_msm_mae.diff",
    "objective.norm_pix_loss": "nttcslab/msm-mae: off",
    "optim": _ORIGINAL,
    "schedule": f"{_ORIGINAL}: 10 of 100 epochs",
}

CLIPS = 1_930_000  # of AudioSet in an epoch
# The size sets model, batch and learning rate together; nothing else changes.
BATCH_SIZE = {"tiny": 32, "small": 128, "base": 2048}
LEARNING_RATE: dict[str, dict[str, Any]] = {
    "tiny": {"lr": 1e-3},
    "small": {"lr": 5e-4},
    "base": {"blr": 3e-4},
}
ORIGINAL_BATCH = 64
DECODER = {"decoder_layers": 4, "decoder_embed_dim": 384, "decoder_ffn_dim": 1536, "decoder_heads": 6}
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
        "decoder_embed_dim": 192,
        "decoder_ffn_dim": 768,
        "decoder_heads": 6,
    },
    "base": DECODER,
}
_READINGS = (
    "crop: 6.08 s of waveform, whose edges the transform mirrors; the code crops 608 frames out of the log-mel of the "
    "whole file",
    "clips: packed without padding; the code fills shorter ones with the log-mel value 0, which is louder than "
    "most sounds after normalisation (--data.padding reference)",
    "input_norm: the fixed -7.1 and 4.2 of the code's checkpoints; its training measures 5000 to 10000 random items "
    "at each start (masktrain data stats measures them)",
    "decoder_layers: 4; the code's argument of that name is not read",
    "cls_token: one, as the published runs; the code without one drops the first visible token in its decoder",
    "weight_decay: on matrices and on class and mask token, as the code's parameter groups come out",
)


def msm_mae(size: str = "base") -> Recipe:
    """80 mel bins x 608 frames in 16 x 16 patches, 75 % masked at random; encoder 12 x 768, decoder 4 x 384."""
    steps = CLIPS // BATCH_SIZE["base"]
    return Recipe(
        name="msm_mae",
        size=size,
        paper="Niizumi et al., Masked Spectrogram Modeling using Masked Autoencoders, HEAR 2021 (PMLR 166)",
        code="nttcslab/m2d at f0c4128, its MAE, with the settings of jstgermainsensortech/m2d at a009ef3",
        readings=(
            *_READINGS,
            "norm_pix_loss: on, as that code has it since 2026; it was off before and in the paper "
            "(--objective.no-norm-pix-loss, or the recipe msm_mae_orig)",
            "decoder_positions: two dimensions, as that code; msm_mae_orig has one",
            "key_bias: q, k and v, as that code; msm_mae_orig has none of k",
            "batch_size: 2048 (4 x 512); lr = 3e-4 x 2048 / 256; an epoch is 1.93 M clips",
        ),
        sources=_SOURCES,
        batch_size=BATCH_SIZE[size],
        frontend=preset("msm_mae"),
        data=DataConfig(clip_seconds=6.08, target_length=608),
        tokens=TokenConfig(patch_freq=16, patch_time=16, order="freq", partial="half"),
        input_norm=InputNormConfig(kind="global", factor=1.0, dataset_mean=-7.1, dataset_std=4.2),
        masking=RandomMasking(mask_ratio=0.75),
        model=MaeConfig(**MODEL[size]),
        objective=ReconstructionConfig(norm_pix_loss=True),
        optim=OptimConfig(
            kind="adamw", **LEARNING_RATE[size], betas=(0.9, 0.95), weight_decay=0.05, clip_norm=3.0
        ),
        schedule=ScheduleConfig(kind="cosine", warmup_steps=20 * steps, total_steps=300 * steps),
    )


def msm_mae_orig(size: str = "base") -> Recipe:
    """msm_mae as first published: 80 x 208, targets as they are, decoder positions in one dimension, 100 epochs."""
    later = msm_mae(size)
    steps = CLIPS // ORIGINAL_BATCH
    model = later.model
    assert isinstance(model, MaeConfig)
    optim = replace(later.optim, clip_norm=None)
    if size == "base":
        optim = replace(optim, blr=1.5e-4, blr_clips=128)
    return replace(
        later,
        name="msm_mae_orig",
        code="nttcslab/msm-mae at f0c442f",
        readings=(
            *_READINGS,
            "crop: 2.08 s, 208 frames; the paper also has 96 to 512 frames (--data.clip-seconds)",
            "lr: 1.5e-4 x batch / 128, as the code divides; the paper's rule names 256 (--optim.blr-clips)",
            "batch_size: 64, the code's default for one GPU",
            "norm_pix_loss: off, decoder_positions: one dimension, key_bias: none, as the code's defaults",
        ),
        sources=tuple({**dict(later.sources), **_ORIGINAL_SOURCES}.items()),
        batch_size=ORIGINAL_BATCH if size == "base" else later.batch_size,
        data=replace(later.data, clip_seconds=2.08, target_length=208),
        model=replace(model, key_bias=False, decoder_positions="sincos_1d"),
        objective=ReconstructionConfig(norm_pix_loss=False),
        optim=optim,
        schedule=ScheduleConfig(kind="cosine", warmup_steps=10 * steps, total_steps=100 * steps),
    )
