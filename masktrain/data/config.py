# SPDX-License-Identifier: Apache-2.0
"""What a recipe says about its clips: how long, cut where, read by what."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from masktrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How clips become batches. None of `loader`, `workers` and `prefetch` changes what a batch holds
    (`loader`: beyond 1e-6 of full scale in lossy files).

    clip_seconds: longest crop; longer files are cut to it, shorter ones are taken whole. None: whole files.
    crop: "random" draws a new crop each epoch, "start" takes the first seconds always.
    loader: "dali", "soundfile", or "auto": DALI where it works, else soundfile.
    workers: threads that read and decode; 0 decodes in the training thread, when a batch is asked for; None
    takes
        one per core that this rank may use, at most 8.
    prefetch: steps that are read ahead of the one in use.
    padding, crop_to_batch_min, target_length: the length policy, which the training step applies to
    spectrograms.
        padding="reference" pads or cuts every clip to `target_length` frames, with log-mel values of 0;
        padding="silence" fills every clip with zero samples up to clip_seconds; crop_to_batch_min cuts every
        clip of a batch to the shortest; otherwise clips keep their lengths.
    """

    clip_seconds: float | None = 10.0
    crop: Literal["random", "start"] = "random"
    loader: Literal["auto", "dali", "soundfile"] = "auto"
    workers: int | None = None
    prefetch: int = 2
    padding: Literal["none", "reference", "silence"] = "none"
    crop_to_batch_min: bool = False
    target_length: int | None = None

    def __post_init__(self) -> None:
        seconds = self.clip_seconds
        if seconds is not None and not (math.isfinite(seconds) and 0 < seconds <= 86400):
            raise ConfigError(
                f"data.clip_seconds: {seconds}; allowed are above 0 to 86400 s, or none for whole files."
            )
        _one_of("crop", self.crop, ("random", "start"))
        _one_of("loader", self.loader, ("auto", "dali", "soundfile"))
        _one_of("padding", self.padding, ("none", "reference", "silence"))
        if self.workers is not None:
            _between("workers", self.workers, 0, 256)
        _between("prefetch", self.prefetch, 1, 64)
        if self.padding == "reference" and self.target_length is None:
            raise ConfigError(
                "data.padding: 'reference' needs data.target_length, the frames to pad or cut to."
            )
        if self.padding == "silence" and seconds is None:
            raise ConfigError("data.padding: 'silence' needs data.clip_seconds, the length to fill clips to.")
        if self.padding != "none" and self.crop_to_batch_min:
            raise ConfigError(
                f"data.crop_to_batch_min: does not go with data.padding {self.padding!r}, which gives every clip "
                "the same length; choose one of the two."
            )
        if self.target_length is not None:
            _between("target_length", self.target_length, 1, 1_000_000)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"data.{name}: {value!r}; allowed are {', '.join(map(repr, allowed))}.")


def _between(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ConfigError(f"data.{name}: {value}; allowed are {least} to {most}.")
