# SPDX-License-Identifier: Apache-2.0
"""Frozen features of labelled clips: computed once, kept in a cache, read by every probe.

Units as nttcslab/eval-audio-repr has them: a clip longer than the task's unit is cut to it, at random (but always in the
same place: word of the seed and the clip id) if it trains or validates, from its start if it tests; a shorter one is
filled with zero samples at its end. A clip that tests in one fold and trains in another is cut from its start, so that
one feature serves all folds. A clip shorter than a patch is filled to one as well, with a warning. A clip's features do not depend on the clips beside it.

The cache holds one file for each layer, named by a digest of the weights, the front end and what else the encoder is
(`FeatureSource.fingerprint`), of the manifest with size and time of change of each file, and of every cut.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.data.crop import crop_length, crop_start
from masktrain.data.decode import Crop
from masktrain.data.loader import default_workers
from masktrain.data.manifest import Manifest
from masktrain.data.soundfile_loader import SoundfileEngine
from masktrain.errors import CheckpointError, DataError
from masktrain.evaluation.encoder import FeatureSource, FrozenEncoder
from masktrain.evaluation.labels import LabelledSet
from masktrain.training import storage
from masktrain.types import AudioBatch

log = logging.getLogger("masktrain.data")

Progress = Callable[[int, int], None]
CROP_SEED = 0
"""Seed of the cuts of training clips: features are the same for every probe's seed."""
AHEAD = 2
"""Batches that are decoded ahead of the one that is encoded."""
_VERSION = 1
_SHOWN = 5


def clip_features(
    encoder: FeatureSource,
    labelled: LabelledSet,
    *,
    layers: Sequence[int],
    cache: Path | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Return (len(layers), C, D) float32 on the CPU: one vector for each layer and clip of the manifest.

    Frames are averaged over time; how the patches of a frame become one vector is `FrozenEncoder.pool`. cache: a folder,
    made where it is absent. progress: called with (clips done, clips).

    Raises DataError for a clip that cannot be decoded, ConfigError for a layer that is not there, RunError where the cache
    cannot be written.
    """
    crops = unit_crops(labelled)
    _name_short(encoder, labelled, crops)
    paths = {layer: _cached(cache, encoder, labelled, crops, f"layer_{layer}") for layer in layers}
    shape = (len(labelled.manifest),)
    found = {layer: _read(path, "features", shape) for layer, path in paths.items()}
    missing = [layer for layer in dict.fromkeys(layers) if found[layer] is None]
    if missing:
        parts = [
            encoder.pooled(audio, missing).cpu()
            for audio in _batches(encoder, labelled, crops, batch_size, progress)
        ]
        for layer, values in zip(missing, torch.cat(parts, 1), strict=True):
            found[layer] = {"features": values.contiguous()}
            _write(paths[layer], {"features": values.contiguous()})
    return torch.stack([_known(found[layer])["features"] for layer in layers])


def token_features(
    encoder: FrozenEncoder,
    labelled: LabelledSet,
    *,
    layer: int,
    cache: Path | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Return all tokens (N, D) float32 of one layer, packed clip by clip, and their cumulative counts (C+1,) int64, on the
    CPU.

    For heads that weigh tokens; a clip of several windows has the tokens of all of them. Arguments and errors as in
    `clip_features`.
    """
    crops = unit_crops(labelled)
    _name_short(encoder, labelled, crops)
    path = _cached(cache, encoder, labelled, crops, f"tokens_{layer}")
    found = _read(path, "cu", (len(labelled.manifest) + 1,))
    if found is None:
        tokens, counts = [], []
        for audio in _batches(encoder, labelled, crops, batch_size, progress):
            spectrogram, windows = encoder.windows(encoder.spectrogram(audio))
            tokens.append(encoder.encode(spectrogram, (layer,))[layer].tokens.cpu())
            per_window = iter(encoder.grid.layout(spectrogram).lengths)
            counts += [sum(next(per_window) for _ in range(n)) for n in windows]
        found = {"tokens": torch.cat(tokens), "cu": torch.tensor([0, *accumulate(counts)])}
        _write(path, found)
    return found["tokens"], found["cu"]


def unit_crops(labelled: LabelledSet) -> list[Crop]:
    """Return what is read of each clip. See the module."""
    manifest, seconds = labelled.manifest, labelled.unit_seconds
    from_start = np.zeros(len(manifest), dtype=bool)
    for split in labelled.splits:
        from_start[split.test] = True
    crops = []
    for clip, (samples, rate) in enumerate(
        zip(manifest.num_samples.tolist(), manifest.sample_rate.tolist(), strict=True)
    ):
        length = crop_length(samples, rate, seconds)
        start = 0 if from_start[clip] else crop_start(CROP_SEED, 0, clip, samples, length)
        crops.append(Crop(manifest.path(clip), start, length, samples, rate))
    return crops


def batch_of(samples: Sequence[NDArray[np.float32]], rates: Sequence[int], ids: Sequence[int]) -> AudioBatch:
    """Return decoded mono clips as a batch on the CPU."""
    return AudioBatch(
        samples=torch.from_numpy(np.concatenate(samples)),
        lengths=tuple(map(len, samples)),
        sample_rates=tuple(rates),
        clip_ids=torch.tensor(ids, dtype=torch.int64),
        starts=torch.zeros(len(ids), dtype=torch.int64),
    )


def decoded(
    manifest: Manifest,
    crops: Sequence[Crop],
    batch_size: int,
    progress: Progress | None = None,
    rows: Sequence[int] | None = None,
) -> Iterator[tuple[range, list[NDArray[np.float32]]]]:
    """Yield places in `crops` and the mono samples there, all in their order, decoded ahead by threads.

    rows: of the manifest, which the crops are of, for messages; None: all. Raises DataError.
    """
    engine = SoundfileEngine(default_workers())
    batches = [range(i, min(i + batch_size, len(crops))) for i in range(0, len(crops), batch_size)]
    try:
        waiting = deque(engine.submit([crops[i] for i in batch]) for batch in batches[:AHEAD])
        for number, batch in enumerate(batches):
            results = waiting.popleft()()
            if number + AHEAD < len(batches):
                waiting.append(engine.submit([crops[i] for i in batches[number + AHEAD]]))
            samples = []
            for place, result in zip(batch, results, strict=True):
                if isinstance(result, DataError):
                    named = manifest.named(place if rows is None else rows[place])
                    raise DataError(f"{named}: {result}. Repair it, or take it out of the manifest.")
                samples.append(result.samples)
            yield batch, samples
            if progress is not None:
                progress(batch.stop, len(crops))
    finally:
        engine.close()


def _batches(
    encoder: FeatureSource,
    labelled: LabelledSet,
    crops: Sequence[Crop],
    batch_size: int,
    progress: Progress | None,
) -> Iterator[AudioBatch]:
    for rows, samples in decoded(labelled.manifest, crops, batch_size, progress):
        rates = [crops[i].sample_rate for i in rows]
        lengths = [max(_unit(labelled, rate), least_samples(encoder, rate)) for rate in rates]
        yield batch_of([filled(s, n) for s, n in zip(samples, lengths, strict=True)], rates, rows)


def _unit(labelled: LabelledSet, rate: int) -> int:
    """Return the samples that every clip has at least, 0 for whole clips."""
    return 0 if labelled.unit_seconds is None else round(labelled.unit_seconds * rate)


def _name_short(encoder: FeatureSource, labelled: LabelledSet, crops: Sequence[Crop]) -> None:
    lengths = [max(crop.length, _unit(labelled, crop.sample_rate)) for crop in crops]
    name_short(encoder, labelled.manifest, lengths)


def filled(samples: NDArray[np.float32], length: int) -> NDArray[np.float32]:
    """Return mono samples with zeros behind them, `length` of them at least."""
    return np.pad(samples, (0, max(0, length - len(samples))))


def least_samples(encoder: FeatureSource, rate: int) -> int:
    """Return the samples at `rate` Hz of the shortest clip that gives a patch."""
    return encoder.frontend.min_samples(rate, encoder.least_frames)


def name_short(encoder: FeatureSource, manifest: Manifest, lengths: Sequence[int]) -> None:
    """Warn, in the log "masktrain.data", of clips that are filled since they are shorter than a patch. lengths: samples of
    each clip of the manifest."""
    rates = manifest.sample_rate.tolist()
    needed = [least_samples(encoder, rate) for rate in rates]
    short = [row for row, n in enumerate(lengths) if n < needed[row]]
    if short:
        first = "; ".join(
            f"{manifest.named(row)}: {lengths[row] / rates[row]:.3f} s of {needed[row] / rates[row]:.3f} s"
            for row in short[:_SHOWN]
        )
        log.warning(
            "%d of %d clips are shorter than a patch and are filled with silence to one: %s",
            len(short),
            len(rates),
            first,
        )


# --- cache ---


def _cached(
    cache: Path | None, encoder: FeatureSource, labelled: LabelledSet, crops: Sequence[Crop], what: str
) -> Path | None:
    if cache is None:
        return None
    hasher = hashlib.sha256()
    key = [_VERSION, encoder.fingerprint, labelled.manifest.digest, labelled.unit_seconds, what]
    hasher.update(json.dumps(key).encode())
    for crop in crops:
        try:
            status = os.stat(crop.path)
        except OSError as error:
            raise DataError(f"{crop.path}: cannot be read: {error.strerror}.") from error
        hasher.update(f"\0{crop.start} {crop.length} {status.st_size} {status.st_mtime_ns}".encode())
    return cache / f"{what}_{hasher.hexdigest()[:32]}.safetensors"


def _read(path: Path | None, name: str, shape: tuple[int, ...]) -> dict[str, Tensor] | None:
    """Return what the cache holds; None where it is absent, damaged, or of another shape."""
    if path is None or not path.is_file():
        return None
    with suppress(CheckpointError, OSError):
        tensors = storage.read_tensors(path)
        if name in tensors and tensors[name].shape[: len(shape)] == shape:
            return tensors
    return None


def _write(path: Path | None, tensors: dict[str, Tensor]) -> None:
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_tensors(temporary, tensors)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise storage.write_failed("cached features", path.parent, error) from error


def _known(tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
    assert tensors is not None
    return tensors
