# SPDX-License-Identifier: Apache-2.0
"""SSAST: a spectrogram transformer over all tokens, trained to match and to reconstruct the masked ones.

Gong et al., "SSAST: Self-Supervised Audio Spectrogram Transformer", AAAI 2022; code YuanGongND/ssast at a1a3eec.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from masktrain.data.config import DataConfig
from masktrain.frontend.presets import preset
from masktrain.masking.strategies import ChunkMasking, RandomMasking
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.ssast import SsastConfig
from masktrain.objectives.joint import JointConfig
from masktrain.training.optim import OptimConfig
from masktrain.training.recipe import Recipe, TokenConfig
from masktrain.training.schedule import ScheduleConfig

_MODEL = "YuanGongND/ssast:src/models/ast_models.py"
_LOADER = "YuanGongND/ssast:src/dataloader.py"
_TRAIN = "YuanGongND/ssast:src/traintest_mask.py"
_SCRIPT = "YuanGongND/ssast:src/pretrain/run_mask_patch.sh, run_mask_frame.sh"
_DEIT = "huggingface/pytorch-image-models 0.4.5:timm/models/vision_transformer.py, DeiT distilled"
_SOURCES = (
    ("batch_size", _SCRIPT),
    ("frontend.mel", f"{_LOADER}, and defaults of pytorch/audio:torchaudio/compliance/kaldi.py, fbank"),
    ("data.clip_seconds", "the paper: 10 s"),
    ("data.target_length", _SCRIPT),
    ("tokens", _SCRIPT),
    ("tokens.order", _MODEL),
    ("input_norm.kind", _LOADER),
    ("input_norm.factor", f"{_LOADER}: divides by 2 std"),
    ("input_norm.dataset_mean", _SCRIPT),
    ("input_norm.dataset_std", _SCRIPT),
    ("masking.type", _MODEL),
    ("masking.mask_ratio", f"{_SCRIPT}: mask_patch 400 of 512"),
    ("model", _DEIT),
    ("model.passes", _TRAIN),
    ("model.columns", f"{_MODEL}: input_tdim / tshape"),
    ("objective", f"{_TRAIN}, and the paper: lambda = 10"),
    ("objective.info_nce_axis", f"{_MODEL}: mpc"),
    ("optim", _TRAIN),
    ("optim.lr", _SCRIPT),
    ("schedule", _TRAIN),
    ("schedule.total_steps", f"{_SCRIPT}: 10 epochs"),
    ("schedule.patience", f"{_SCRIPT}: lr_patience"),
    ("schedule.evaluate_every", f"{_SCRIPT}: epoch_iter"),
)

CLIPS = 1_953_000 + 281_000  # of AudioSet, and of LibriSpeech in segments of 10 s: an epoch
EPOCHS = 10
FRAMES = 1024  # which the learned positions cover
# The size sets model, batch and learning rate together; nothing else changes but the steps of its batch.
PUBLISHED_BATCH = {"tiny": 120, "small": 24, "base": 24}
BATCH_SIZE = {"tiny": 8, "small": 24, "base": 24}
EVALUATE_EVERY = {"tiny": 800, "small": 4000, "base": 4000}
LEARNING_RATE = {"tiny": 1.5e-4, "small": 1e-4, "base": 1e-4}
MODEL: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 192, "ffn_dim": 768, "heads": 3},
    "small": {"embed_dim": 384, "ffn_dim": 1536, "heads": 6},
    "base": {},
}
_READINGS = (
    "passes: one for each objective, each under its own mask, as the code; one for both is half the cost "
    "(--model.passes 1)",
    "info_nce_axis: the softmax runs over the predictions of each target, as the code; the paper's formula runs over "
    "the targets of each prediction (--objective.info-nce-axis targets). The code's reported accuracy mixes the two "
    "and is not computed here",
    "mask_ratio: 400 of 512 tokens, as the code; its text says 75 %. Clips of other lengths keep the ratio",
    "window: Hann, as the code asks of torchaudio (MAE-AST's Povey: --frontend.mel.window povey)",
    "clips: 10 s, packed without padding; the code fills the 998 frames of 10 s with zeros after the logarithm to "
    "1024 (--data.padding reference), and keeps the first frames of longer files (--data.crop start)",
    "tokens: a last column is kept where at least half of it is filled (--tokens.partial drop)",
    "positions: a learned table of 1024 frames; shorter clips use its first columns, longer ones are refused "
    "(--model.columns)",
    "input_norm: AudioSet's mean and standard deviation, measured with padding (masktrain data stats measures others)",
    "weight_decay: into the gradient of every parameter (L2), as torch's Adam has it",
    "schedule: 10 epochs of 2.234 M clips (AudioSet and LibriSpeech in 10 s segments), the most that the code's "
    "scripts ask for; warm-up in a straight line, where the code goes in jumps of 50 steps from 0",
    "plateau: the rate is halved at the third evaluation in a row without a gain, as torch counts patience 2: after "
    "12000 steps without one, where the paper says 8000 (--schedule.patience 1). What has to gain is the loss of the "
    "held-out clips; the code watches the accuracy of matching on AudioSet's evaluation clips",
    "sizes: tiny (12 x 192), small and base as published. tiny has batch 8 and rate 1.5e-4, so that it trains on a "
    "CPU, and the steps of its published batch 120 and rate 5e-4 (--batch-size 120 --optim.lr 5e-4); small has batch "
    "and rate of base, since no script tells its own",
)


def ssast_patch(size: str = "base") -> Recipe:
    """16 x 16 patches of 128 mel bins, 78 % masked in chunks of 3 to 5 patches a side; encoder 12 x 768."""
    return Recipe(
        name="ssast_patch",
        size=size,
        paper="Gong et al., SSAST: Self-Supervised Audio Spectrogram Transformer, AAAI 2022",
        code="YuanGongND/ssast at a1a3eec",
        readings=(
            *_READINGS,
            "masking: chunks clipped at the grid's edges and surplus cells dropped at random; the code lets chunks "
            "wrap, never masks token 0 and drops the last cells, so that the lowest mel row is masked half as often "
            "(--masking.growth wrap --masking.truncation first --masking.spare-first)",
        ),
        sources=(*_SOURCES, ("masking.sides", _MODEL)),
        batch_size=BATCH_SIZE[size],
        frontend=preset("ssast"),
        data=DataConfig(clip_seconds=10.0, target_length=FRAMES),
        tokens=TokenConfig(patch_freq=16, patch_time=16, order="freq", partial="half"),
        input_norm=InputNormConfig(kind="global", factor=0.5, dataset_mean=-4.2677393, dataset_std=4.5689974),
        masking=ChunkMasking(mask_ratio=0.78125, sides=(3, 4, 5)),
        model=SsastConfig(**MODEL[size], columns=FRAMES // 16),
        objective=JointConfig(reconstruction_weight=10.0, info_nce_weight=1.0, info_nce_axis="predictions"),
        optim=OptimConfig(
            kind="adam",
            lr=LEARNING_RATE[size],
            betas=(0.95, 0.999),
            weight_decay=5e-7,
            coupled_decay=True,
            decay_all=True,
        ),
        schedule=ScheduleConfig(
            kind="plateau",
            warmup_steps=1000,
            total_steps=EPOCHS * CLIPS // PUBLISHED_BATCH[size],
            factor=0.5,
            patience=2,
            evaluate_every=EVALUATE_EVERY[size],
        ),
    )


def ssast_frame(size: str = "base") -> Recipe:
    """Tokens of 2 frames x 128 mel bins, 78 % masked at random; encoder 12 x 768."""
    patch = ssast_patch(size)
    assert isinstance(patch.model, SsastConfig)
    return replace(
        patch,
        name="ssast_frame",
        readings=_READINGS,
        sources=_SOURCES,
        tokens=TokenConfig(patch_freq=128, patch_time=2, order="freq", partial="half"),
        masking=RandomMasking(mask_ratio=0.78125),
        model=replace(patch.model, columns=FRAMES // 2),
    )
