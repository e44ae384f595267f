# SPDX-License-Identifier: Apache-2.0
"""The demo corpus: a small labelled set of synthetic clips in real audio files, made once.

210 clips of seven kinds of sound in five folds: FLAC, WAV and Ogg Vorbis at six sample rates, 0.5 to 8 s, one
in ten stereo. Samples are a function of the seed and the clip's number alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from numpy.random import Generator, Philox
from numpy.typing import NDArray

from masktrain.data.manifest import shown
from masktrain.data.synth import KINDS, scene
from masktrain.errors import DataError

CLIPS = 210
FOLDS = 5
RATES = (8000, 16000, 22050, 32000, 44100, 48000)
FORMATS = (("flac", "FLAC", "PCM_16"), ("wav", "WAV", "PCM_16"), ("ogg", "OGG", "VORBIS"))
MANIFEST = "demo.csv"
_RECORD = "corpus.json"
_VERSION = 1
_BLOCK = 65536


def clip(seed: int, number: int) -> tuple[NDArray[np.int16], int]:
    """Return the samples (n, channels) of one clip and its rate in Hz."""
    rng = Generator(Philox(key=np.array([seed, number], dtype=np.uint64)))
    rate = RATES[number % len(RATES)]
    length = int(rate * np.exp(rng.uniform(np.log(0.5), np.log(8.0))))
    wave = scene(KINDS[number % len(KINDS)], rng, length, rate)
    # stereo: the same sound, quieter and 0.4 ms later on the right
    channels = [wave]
    if number % 10 == 3:
        delay = rate // 2500
        channels.append(0.7 * np.concatenate((np.zeros(delay), wave[:-delay])))
    return np.rint(np.stack(channels, axis=1) * 32767).astype(np.int16), rate


def make_demo(root: Path, seed: int = 0) -> Path:
    """Return the manifest (CSV: `path`, `label`, `fold`) of the demo corpus below `root`; make it if need be.

    The corpus is the folder `demo-<seed>`. It is complete if its record and the sizes of all files agree;
    else it is made again in a temporary folder and renamed, so that several processes may do so at once.
    Raises DataError if `root` cannot be written, or if that folder holds files that are not the corpus's own.
    """
    folder = Path(root) / f"demo-{seed}"
    if _complete(folder, seed):
        return folder / MANIFEST
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            _write(made, seed)
            os.chmod(made, 0o755)
            _put(made, folder, seed)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise DataError(
            f"The demo corpus cannot be written to {shown(folder)}: {error}. Name a folder that can be "
            "written, or your own audio with --data."
        ) from error
    return folder / MANIFEST


def _name(number: int) -> str:
    return f"{KINDS[number % len(KINDS)]}_{number:03d}.{FORMATS[number // len(RATES) % len(FORMATS)][0]}"


def _write(folder: Path, seed: int) -> None:
    """Write all clips, the manifest and the record into an empty folder."""
    lines = ["path,label,fold"]
    for number in range(CLIPS):
        samples, rate = clip(seed, number)
        _, kind, subtype = FORMATS[number // len(RATES) % len(FORMATS)]
        with soundfile.SoundFile(
            folder / _name(number), "w", rate, samples.shape[1], subtype=subtype, format=kind
        ) as file:
            for begin in range(0, len(samples), _BLOCK):
                file.write(samples[begin : begin + _BLOCK])
        lines.append(f"{_name(number)},{KINDS[number % len(KINDS)]},{number // len(KINDS) % FOLDS + 1}")
    (folder / MANIFEST).write_text("\n".join([*lines, ""]), encoding="utf-8")
    sizes = {name: (folder / name).stat().st_size for name in _files()}
    record = {"version": _VERSION, "seed": seed, "sizes": sizes}
    (folder / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _files() -> list[str]:
    return [MANIFEST, *map(_name, range(CLIPS))]


def _complete(folder: Path, seed: int) -> bool:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in _files()}
    except (OSError, ValueError):
        return False
    return bool(record == {"version": _VERSION, "seed": seed, "sizes": sizes})


def _put(made: Path, folder: Path, seed: int) -> None:
    """Rename the finished corpus into place; a damaged one there is removed, one that just came is kept."""
    if folder.is_dir() and not _complete(folder, seed):
        own = {_RECORD, *_files()}
        foreign = sorted(entry.name for entry in folder.iterdir() if entry.name not in own)
        if foreign:
            raise DataError(
                f"{shown(folder)}: not a whole demo corpus, and it holds other files ({shown(foreign[0])}); "
                "remove or rename the folder."
            )
        shutil.rmtree(folder)
    with contextlib.suppress(OSError):
        made.rename(folder)
    if not _complete(folder, seed):
        raise OSError("its place is taken")
