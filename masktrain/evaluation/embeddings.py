# SPDX-License-Identifier: Apache-2.0
"""Embeddings of audio files of any length: one for each clip, and one for each patch column with its time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from masktrain.data.decode import Crop
from masktrain.data.manifest import Manifest
from masktrain.errors import RunError
from masktrain.evaluation.encoder import FrozenEncoder, Pool
from masktrain.evaluation.features import Progress, batch_of, decoded, filled, least_samples, name_short


@dataclass(frozen=True, eq=False)
class Embeddings:
    """paths: C files. clips: (C, D) float32, the means of `frames`. frames: (T, D) float32, those of all files one after
    another. cu_frames: (C+1,) int64. timestamps_ms: (T,) float64, the middle of each frame from the start of its file."""

    paths: tuple[str, ...]
    clips: NDArray[np.float32]
    frames: NDArray[np.float32]
    cu_frames: NDArray[np.int64]
    timestamps_ms: NDArray[np.float64]


def embed_files(
    encoder: FrozenEncoder,
    manifest: Manifest,
    layer: int,
    *,
    pool: Pool | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Embeddings:
    """Return the embeddings of encoder layer `layer`, counted from 1, of whole files.

    pool: see `Pool`; None: the encoder's own. A file shorter than a patch is filled with silence to one, with a
    warning. Raises DataError for a file that cannot be decoded.
    """
    lengths, rates = manifest.num_samples.tolist(), manifest.sample_rate.tolist()
    name_short(encoder, manifest, lengths)
    crops = [
        Crop(manifest.path(i), 0, n, n, rate) for i, (n, rate) in enumerate(zip(lengths, rates, strict=True))
    ]
    clips, frames, times = [], [], []
    columns: list[int] = []
    for rows, samples in decoded(manifest, crops, batch_size, progress):
        least = [least_samples(encoder, rates[i]) for i in rows]
        whole = [filled(s, n) for s, n in zip(samples, least, strict=True)]
        batch = batch_of(whole, [rates[i] for i in rows], rows)
        found = encoder.frames(batch, (layer,), pool)
        values = found.values[layer].cpu()
        for clip in values.split(list(found.columns)):
            clips.append(clip.mean(0).numpy())
            times.append(encoder.centres_ms(len(clip)).numpy())
        frames.append(values.numpy())
        columns += found.columns
    return Embeddings(
        paths=tuple(manifest.path(row) for row in range(len(manifest))),
        clips=np.stack(clips),
        frames=np.concatenate(frames),
        cu_frames=np.concatenate([[0], np.cumsum(columns)]).astype(np.int64),
        timestamps_ms=np.concatenate(times),
    )


def write_npz(path: Path, embeddings: Embeddings, encoder: FrozenEncoder, layer: int) -> None:
    """Write the arrays, with the encoder's name and fingerprint and the layer, whole or not at all. Raises RunError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    paths=np.array(embeddings.paths),
                    clips=embeddings.clips,
                    frames=embeddings.frames,
                    cu_frames=embeddings.cu_frames,
                    timestamps_ms=embeddings.timestamps_ms,
                    encoder=np.array(encoder.name),
                    fingerprint=np.array(encoder.fingerprint),
                    layer=np.array(layer),
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(
            f"--out {path}: cannot be written ({error.strerror or error}). Name a file in a folder that can be (-o)."
        ) from error
