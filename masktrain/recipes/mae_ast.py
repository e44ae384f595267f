# SPDX-License-Identifier: Apache-2.0
"""MAE-AST: masked autoencoding of spectrogram frames or patches with a reconstruction and a matching loss.

Baade, Peng and Harwath, "MAE-AST: Masked Autoencoding Audio Spectrogram Transformer", Interspeech 2022;
code AlanBaade/MAE-AST-Public at 287574d.
"""

from __future__ import annotations

from dataclasses import replace

from masktrain.data.config import DataConfig
from masktrain.frontend.presets import preset
from masktrain.masking.strategies import ChunkMasking, RandomMasking
from masktrain.models.input_norm import InputNormConfig
from masktrain.models.mae_ast import SIZES, MaeAstConfig
from masktrain.objectives.joint import JointConfig
from masktrain.training.optim import OptimConfig
from masktrain.training.recipe import Recipe, TokenConfig
from masktrain.training.schedule import ScheduleConfig

_YAML = "AlanBaade/MAE-AST-Public:config/pretrain/mae_ast.yaml"
_CODE = "AlanBaade/MAE-AST-Public:mae_ast/models/mae_ast.py"
_DATASET = "AlanBaade/MAE-AST-Public:mae_ast/data/mae_ast_dataset.py"
_CRITERION = "AlanBaade/MAE-AST-Public:mae_ast/criterions/mae_ast_criterion.py"
_README = "AlanBaade/MAE-AST-Public:README.md, commands"
_KALDI = "defaults of pytorch/audio:torchaudio/compliance/kaldi.py, fbank"
_SOURCES = (
    ("batch_size", f"{_README}: max_tokens, 33 to 52 clips"),
    ("frontend.mel", _KALDI),
    ("frontend.mel.sample_rate", _DATASET),
    ("frontend.mel.n_mels", _DATASET),
    ("frontend.mel.remove_mean", f"{_DATASET}: removes none"),
    ("data.clip_seconds", "the paper: clips of 10 s"),
    ("data.target_length", "frames of 10 s"),
    ("tokens.patch_freq", _README),
    ("tokens.patch_time", _README),
    ("tokens.order", f"{_CODE}: unfold"),
    ("tokens.partial", f"{_CODE}: unfold"),
    ("input_norm.kind", f"{_CODE}: BatchNorm2d"),
    ("input_norm.factor", f"{_CODE}: BatchNorm2d times 0.5"),
    ("masking.type", _README),
    ("masking.mask_ratio", _YAML),
    ("model.encoder_layers", _README),
    ("model.embed_dim", _CODE),
    ("model.ffn_dim", _CODE),
    ("model.heads", _CODE),
    ("model.decoder_layers", _YAML),
    ("model.decoder_embed_dim", _CODE),
    ("model.decoder_ffn_dim", _CODE),
    ("model.decoder_heads", _CODE),
    ("model.bridge", f"{_CODE}: only between widths that differ"),
    ("model.norm", f"{_CODE}: layer_norm_first is off"),
    ("model.dropout", _YAML),
    ("model.attention_dropout", _YAML),
    ("model.activation_dropout", _YAML),
    ("model.dropout_input", _YAML),
    ("model.encoder_layerdrop", _YAML),
    ("model.decoder_layerdrop", _YAML),
    ("objective", _YAML),
    ("objective.info_nce_axis", _CRITERION),
    ("optim", _YAML),
    ("optim.decay_all", "facebookresearch/fairseq:fairseq/optim/adam.py"),
    ("optim.coupled_decay", "facebookresearch/fairseq:fairseq/optim/adam.py"),
    ("schedule.kind", f"{_YAML}: polynomial_decay of power 1"),
    ("schedule.warmup_steps", _YAML),
    ("schedule.total_steps", _README),
)

# The size sets model, batch and learning rate together; nothing else changes.
BATCH_SIZE = {"tiny": 16, "small": 32, "base": 32}
# tiny: at 1e-3 the encoder of some seeds (mae_ast_frame, seed 1) ends as a constant.
LEARNING_RATE = {"tiny": 5e-4, "small": 3e-4, "base": 1e-4}


def mae_ast_frame(size: str = "base") -> Recipe:
    """Tokens of 2 frames x 128 mel bins, 75 % masked at random, 12 encoder layers."""
    return Recipe(
        name="mae_ast_frame",
        size=size,
        paper="Baade, Peng and Harwath, MAE-AST, Interspeech 2022",
        code="AlanBaade/MAE-AST-Public at 287574d",
        readings=(
            "norm: post-LN with an input LayerNorm, as the code and the published weights have it; a pre-LN reading "
            "is --model.norm pre",
            "length: clips are cropped to 10 s and packed without padding; the code crops every batch to its "
            "shortest clip (--data.crop-to-batch-min), the paper pads (--data.padding reference)",
            "token order: time-major, as the code unfolds the spectrogram",
            "window: Povey, torchaudio's Kaldi default, since the code names none",
            "info_nce_axis: softmax over the targets of each prediction, as paper and code have it (SSAST's code "
            "takes the other axis)",
            "batch_size: the code packs by tokens, about 33 clips of 48 kHz or 52 of 16 kHz; 32 at size base",
            "schedule: 550000 updates as the README's commands; the yaml says 400000",
            "weight_decay: decoupled and on every parameter, as fairseq's Adam applies it",
        ),
        sources=_SOURCES,
        batch_size=BATCH_SIZE[size],
        frontend=preset("mae_ast"),
        data=DataConfig(clip_seconds=10.0, target_length=998),
        tokens=TokenConfig(patch_freq=128, patch_time=2, order="time", partial="drop"),
        input_norm=InputNormConfig(kind="batch", factor=0.5),
        masking=RandomMasking(mask_ratio=0.75),
        model=MaeAstConfig(**SIZES[size]),
        objective=JointConfig(reconstruction_weight=10.0, info_nce_weight=1.0, info_nce_axis="targets"),
        optim=OptimConfig(
            kind="adam",
            lr=LEARNING_RATE[size],
            betas=(0.9, 0.98),
            eps=1e-6,
            weight_decay=0.01,
            decay_all=True,
            clip_norm=10.0,
        ),
        schedule=ScheduleConfig(kind="linear", warmup_steps=32_000, total_steps=550_000),
    )


def mae_ast_patch(size: str = "base") -> Recipe:
    """Tokens of 16 x 16, 75 % masked in chunks of 3 to 5 patches a side, 12 encoder layers."""
    frame = mae_ast_frame(size)
    return replace(
        frame,
        name="mae_ast_patch",
        readings=(
            *frame.readings,
            "masking: one mask per clip, blocks clipped at the grid's edges and surplus cells dropped at random; the "
            "code shares one mask in the batch, lets blocks wrap and drops the last cells (--masking.shared-in-batch "
            "--masking.growth wrap --masking.truncation first)",
        ),
        sources=(*frame.sources, ("masking.sides", f"{_CODE}: chunks of 3 to 5, after SSAST")),
        tokens=TokenConfig(patch_freq=16, patch_time=16, order="time", partial="drop"),
        masking=ChunkMasking(mask_ratio=0.75),
    )


def mae_ast_frame_6l(size: str = "base") -> Recipe:
    """mae_ast_frame with 6 encoder layers."""
    return _six_layers(mae_ast_frame(size))


def mae_ast_patch_6l(size: str = "base") -> Recipe:
    """mae_ast_patch with 6 encoder layers."""
    return _six_layers(mae_ast_patch(size))


def _six_layers(recipe: Recipe) -> Recipe:
    layers = min(6, recipe.model.encoder_layers)
    return replace(recipe, name=f"{recipe.name}_6l", model=replace(recipe.model, encoder_layers=layers))
