# SPDX-License-Identifier: Apache-2.0
"""The front ends of the published methods, and the statistics that they were published with.

Two families cover nearly all. Kaldi filter banks (AST, SSAST, AudioMAE, EAT, AudioMosaic, MAE-AST, BEATs): 25
ms frames every 10 ms at 16 kHz, mean of each frame removed, pre-emphasis 0.97 in the frame, 128 filters from
20 Hz to 8 kHz, floor at the float32 machine epsilon. Centred STFTs (M2D, MSM-MAE; PaSST, MaskSpec).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from masktrain.errors import ConfigError, nearest
from masktrain.frontend.config import FrontendConfig
from masktrain.kernels.log_mel import MelSpec

FLOAT32_EPS = 2.0**-23
"""1.1920928955078125e-07, the floor of torchaudio's Kaldi logarithm and of M2D's: -15.94 after the
logarithm."""

# YuanGongND/ast:src/dataloader.py, _wav2fbank: waveform mean removed, Hann window; the other values are the
# defaults of pytorch/audio:torchaudio/compliance/kaldi.py, fbank.
_KALDI_HANN = MelSpec(
    sample_rate=16_000,
    n_fft=512,
    win_length=400,
    hop=160,
    window="hann",
    framing="snip",
    remove_mean=True,
    remove_dc=True,
    frame_preemphasis=0.97,
    mel="kaldi",
    n_mels=128,
    fmin=20.0,
    fmax=8000.0,
    log="max",
    eps=FLOAT32_EPS,
)
# AlanBaade/MAE-AST-Public:mae_ast/data/mae_ast_dataset.py names no window and so takes Kaldi's default,
# Povey.
_KALDI_POVEY = replace(_KALDI_HANN, window="povey", remove_mean=False)
# nttcslab/m2d:wav_to_lms.py and nttcslab/msm-mae:wav_to_lms.py: nnAudio MelSpectrogram, ln(x + float32
# epsilon).
_M2D = MelSpec(
    sample_rate=16_000,
    n_fft=400,
    win_length=400,
    hop=160,
    window="hann_periodic",
    framing="centre",
    mel="slaney",
    n_mels=80,
    fmin=50.0,
    fmax=8000.0,
    log="add",
    eps=FLOAT32_EPS,
)
# kkoutini/PaSST:models/preprocess.py, AugmentMelSTFT in eval mode: fmax = 16000 - fmax_aug_range / 2 with
# range 1000. In training mode both edges are drawn anew in each call.
_PASST = MelSpec(
    sample_rate=32_000,
    n_fft=1024,
    win_length=800,
    hop=320,
    window="hann",
    framing="centre",
    wave_preemphasis=0.97,
    mel="kaldi",
    n_mels=128,
    fmin=0.0,
    fmax=15_500.0,
    log="add",
    eps=1e-5,
    offset=4.5,
    divisor=5.0,
)

_SPECS = {
    "audiomae": _KALDI_HANN,
    "ssast": _KALDI_HANN,
    "ast": _KALDI_HANN,
    "eat": _KALDI_HANN,
    "audiomosaic": _KALDI_HANN,
    "mae_ast": _KALDI_POVEY,
    # microsoft/unilm:beats/BEATs.py, preprocess: samples in the range of 16-bit integers.
    "beats": replace(_KALDI_POVEY, wave_scale=2.0**15),
    "m2d": _M2D,
    "msm_mae": _M2D,
    "passt": _PASST,
    # WangHelin1997/MaskSpec:models/models_mae.py: PaSST's with fmax_aug_range 2000.
    "maskspec": replace(_PASST, fmax=15_000.0),
}
PRESETS = tuple(_SPECS)


# fmin_aug_range and fmax_aug_range of the same files
_JITTER = {"passt": (10, 1000), "maskspec": (10, 2000)}


def preset(name: str) -> FrontendConfig:
    """Return the front end called `name`."""
    if name not in _SPECS:
        raise ConfigError(
            f"frontend: no preset {name!r}.{nearest(name, PRESETS)} Allowed: {', '.join(PRESETS)}."
        )
    fmin_jitter, fmax_jitter = _JITTER.get(name, (0, 0))
    return FrontendConfig(preset=name, mel=_SPECS[name], fmin_jitter=fmin_jitter, fmax_jitter=fmax_jitter)


@dataclass(frozen=True, kw_only=True)
class PublishedNorm:
    """Statistics of a data set's log-mel values: the model sees (x - dataset_mean) / (factor *
    dataset_std)."""

    dataset_mean: float
    dataset_std: float
    factor: float
    source: str


def _norm(mean: float, std: float, source: str, factor: float = 2.0) -> PublishedNorm:
    return PublishedNorm(dataset_mean=mean, dataset_std=std, factor=factor, source=source)


# Measured with mixup, SpecAugment and padding on (src/get_norm_stats.py of the same project).
_AST = "YuanGongND/ast:src/run.py, norm_stats"
_AST_NORMS = {
    "audioset": _norm(-4.2677393, 4.5689974, _AST),
    "esc50": _norm(-6.6268077, 5.358466, _AST),
    "speech_commands": _norm(-6.845978, 5.5654526, _AST),
}
_EAT = "cwx-worst-one/EAT:data/raw_audio_dataset.py, norm_mean and norm_std"
_BEATS = "microsoft/unilm:beats/BEATs.py, preprocess"
_M2D_NORM = _norm(-7.1, 4.2, "nttcslab/m2d, the constant norm_stats of its checkpoints", factor=1.0)
_MASKSPEC_NORM = _norm(-0.046, 0.712, "WangHelin1997/MaskSpec:mean_std_128.npy", factor=1.0)

PUBLISHED_NORMS: dict[str, dict[str, PublishedNorm]] = {
    "audiomae": _AST_NORMS,
    "ssast": _AST_NORMS,
    "ast": _AST_NORMS,
    "eat": {
        "audioset": _norm(-4.268, 4.569, _EAT),
        "esc50": _norm(-6.627, 5.359, _EAT),
        "speech_commands": _norm(-6.846, 5.565, _EAT),
    },
    # The paper's table 6 has -6.702 and 5.448 for Speech Commands 1; the code takes version 2's for both.
    "audiomosaic": _AST_NORMS,
    "beats": {"audioset": _norm(15.41663, 6.55582, _BEATS)},
    "m2d": {"audioset": _M2D_NORM},
    "msm_mae": {"audioset": _M2D_NORM},
    # Published per bin; these are the global figures of that file. Its bins 120 to 127 have a standard
    # deviation under 0.05, since that corpus was low-passed by its MP3 encoder: no values to divide by.
    "maskspec": {"audioset": _MASKSPEC_NORM},
}
"""Preset -> data set -> statistics. None for mae_ast (normalised by batch) and passt (its affine serves)."""


def published_norm(name: str, dataset: str = "audioset") -> PublishedNorm:
    """Return the statistics that preset `name` was published with for `dataset`."""
    norms = PUBLISHED_NORMS.get(name, {})
    if dataset not in norms:
        known = ", ".join(norms) if norms else "none"
        raise ConfigError(
            f"frontend: preset {name!r} has no published statistics of {dataset!r}; there are: {known}. "
            f"Measure them with `masktrain data stats`."
        )
    return norms[dataset]
