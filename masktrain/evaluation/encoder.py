# SPDX-License-Identifier: Apache-2.0
"""A trained encoder as evaluation sees it: frozen, in evaluation mode, in float32; and the features that need none.

Every clip is encoded at its own length. One that is longer than what the encoder was trained on (the recipe's
`data.target_length`, and at least the columns of learned positions) is encoded in windows: as few as fit, of lengths
that differ by one patch column at most, without overlap. nttcslab/eval-audio-repr:evar/ar_m2d.py cuts in the same way,
but leaves all the rest to the last window.

The input is normalised with the values in the checkpoint (running ones for an input norm of the batch), never with
those of the clips that are evaluated: a clip's features depend on the clip alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from masktrain.config import to_dict
from masktrain.errors import ConfigError, DataError
from masktrain.frontend.config import FrontendConfig
from masktrain.frontend.frontend import Frontend
from masktrain.masking.plan import unmasked
from masktrain.models import registry
from masktrain.models.pretrainer import Encoded, Pretrainer
from masktrain.training.checkpoint import load_model
from masktrain.training.recipe import Recipe
from masktrain.training.weights import find_checkpoint
from masktrain.types import AudioBatch, MaskPlan, Spectrogram, TokenGrid, TokenLayout, cumulative

Pool = Literal["concat", "mean"]
"""How the patches of a time column become one frame: their vectors one after another, from low to high frequency
(freq * D values, as nttcslab/eval-audio-repr:evar/ar_m2d.py has it), or their mean (D values)."""
PlanOf = Callable[[TokenLayout], MaskPlan]
WINDOWS_AT_ONCE = 64


class FeatureSource(Protocol):
    """What turns audio into one vector a clip: `FrozenEncoder`, `LogMelBaseline`.

    name: for tables. n_layers: its layers, counted from 1. least_frames: of the shortest clip. fingerprint: changes with
    everything that changes features.
    """

    name: str
    n_layers: int
    frontend: FrontendConfig
    least_frames: int

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex)."""
        ...

    def pooled(self, audio: AudioBatch, layers: Sequence[int]) -> Tensor:
        """Return (len(layers), B, D) float32, one vector a clip and layer, averaged over time."""
        ...


@dataclass(frozen=True)
class Frames:
    """Frame embeddings of a batch. values: {layer: (T, D')} float32, packed, one row for each patch column of each clip.
    columns: of each clip."""

    values: dict[int, Tensor]
    columns: tuple[int, ...]


class FrozenEncoder:
    """The encoder of a checkpoint: no gradient, no dropout, float32.

    name: recipe, size and step. n_layers: encoder layers. width: of one token. sample_rate: Hz that audio of any rate is
    resampled to. recipe: of the run. step: updates made, 0 for untrained weights. path: where it was loaded from.
    max_columns: patch columns of the longest window, None without a limit. pool: see `Pool`.
    """

    def __init__(
        self, recipe: Recipe, model: Pretrainer, name: str, *, step: int = 0, path: Path | None = None
    ) -> None:
        """model: as it is, on its device; it is neither copied nor put into evaluation mode."""
        self.recipe = recipe
        self.model = model
        self.name = name
        self.step = step
        self.path = path
        self.grid = recipe.grid
        self.frontend = recipe.frontend
        self.n_layers: int = model.encoder.config.layers
        self.width: int = model.encoder.config.width
        self.sample_rate = recipe.frontend.sample_rate
        self.max_columns = _max_columns(recipe)
        self.least_frames = least_frames(recipe)
        self.pool: Pool = "concat"
        self._to_mel = Frontend(recipe.frontend)
        self._fingerprint: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is, wherever it has been moved."""
        return next(self.model.parameters()).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of weights, front end, tokens, input norm, model config, windows and pooling."""
        if self._fingerprint is None:
            recipe = self.recipe
            parts = (recipe.frontend, recipe.tokens, recipe.input_norm, recipe.model)
            configs = json.dumps([*map(to_dict, parts), self.max_columns, self.pool], sort_keys=True)
            hasher = hashlib.sha256(configs.encode())
            for key, tensor in sorted(self.model.state_dict().items()):
                hasher.update(f"\0{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
                hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            self._fingerprint = hasher.hexdigest()
        return self._fingerprint

    def spectrogram(self, audio: AudioBatch) -> Spectrogram:
        """Return the log-mel of whole clips on the encoder's device, not normalised. Raises DataError for a clip that is
        shorter than one patch."""
        spectrogram = _log_mel(self._to_mel, audio, self.device)
        short = [i for i, n in enumerate(spectrogram.lengths) if not self.grid.columns(n)]
        if short:
            clip, rate = short[0], audio.sample_rates[short[0]]
            raise DataError(
                f"clip {int(audio.clip_ids[clip])}: {audio.lengths[clip] / rate:.3f} s give no patch; {self.recipe.name} "
                f"needs at least {self.frontend.min_samples(rate, self.least_frames) / rate:.3f} s."
            )
        return spectrogram

    def windows(self, spectrogram: Spectrogram) -> tuple[Spectrogram, tuple[int, ...]]:
        """Return the windows that the encoder reads, each as a clip, with the clip id of theirs, and how many each clip
        has. See the module."""
        pieces = [tuple(_window_frames(n, self.grid, self.max_columns)) for n in spectrogram.lengths]
        counts = tuple(map(len, pieces))
        lengths = tuple(n for clip in pieces for n in clip)
        if lengths == spectrogram.lengths:
            return spectrogram, counts
        device = spectrogram.frames.device
        repeats = torch.tensor(counts).to(device, non_blocking=True)
        ids = spectrogram.clip_ids.repeat_interleave(repeats, output_size=len(lengths))
        cu_frames = cumulative(lengths, torch.int64, device)
        return replace(spectrogram, lengths=lengths, cu_frames=cu_frames, clip_ids=ids), counts

    def layout(self, audio: AudioBatch) -> TokenLayout:
        """Return the tokens of the windows of a batch, as `embed` returns them without a plan."""
        return self.grid.layout(self.windows(self.spectrogram(audio))[0])

    def embed(
        self, audio: AudioBatch, layers: Sequence[int], plan_of: PlanOf | None = None
    ) -> dict[int, Encoded]:
        """Return the tokens of encoder layers, float32.

        layers: counted from 1; the last has passed the encoder's final norm. plan_of: masks of the windows for masking at
        inference; None: everything is visible. tokens: (N, D), in the order of their ids, the visible ones only in a model
        that drops masked tokens. leading: (W, k, D), of each window.
        """
        return self.encode(self.windows(self.spectrogram(audio))[0], layers, plan_of)

    def encode(
        self, spectrogram: Spectrogram, layers: Sequence[int], plan_of: PlanOf | None = None
    ) -> dict[int, Encoded]:
        """Like `embed`, for windows. Without a plan WINDOWS_AT_ONCE of them are encoded together, which bounds the memory of
        long files."""
        self._check_layers(layers)
        if plan_of is not None:
            return self._encode(spectrogram, layers, plan_of)
        parts = [self._encode(part, layers, unmasked) for part in _in_groups(spectrogram)]
        return {
            layer: Encoded(
                torch.cat([part[layer].tokens for part in parts]),
                torch.cat([part[layer].leading for part in parts]),
            )
            for layer in layers
        }

    @torch.no_grad()
    def _encode(self, spectrogram: Spectrogram, layers: Sequence[int], plan_of: PlanOf) -> dict[int, Encoded]:
        plan = plan_of(self.grid.layout(spectrogram))
        mean, scale = self.model.input_norm.affine(None)
        frames = spectrogram.frames.to(next(self.model.parameters()).dtype)
        encoded = self.model.encoded(replace(spectrogram, frames=frames), plan, mean, scale, set(layers))
        return {
            layer: Encoded(encoded[layer].tokens.float(), encoded[layer].leading.float()) for layer in layers
        }

    def frames(self, audio: AudioBatch, layers: Sequence[int], pool: Pool | None = None) -> Frames:
        """Return one embedding for each patch column: (T, freq * D) with pool "concat", (T, D) with "mean"; None: the
        encoder's `pool`."""
        spectrogram, counts = self.windows(self.spectrogram(audio))
        encoded = self.encode(spectrogram, layers)
        layout = self.grid.layout(spectrogram)
        by_column = _by_column(layout).to(self.device)
        values = {}
        for layer in layers:
            cells = encoded[layer].tokens.index_select(0, by_column).unflatten(0, (-1, self.grid.freq))
            values[layer] = cells.flatten(1) if (pool or self.pool) == "concat" else cells.mean(1)
        per_window = iter(layout.columns)
        columns = tuple(sum(next(per_window) for _ in range(n)) for n in counts)
        return Frames(values, columns)

    def centres_ms(self, columns: int) -> Tensor:
        """Return (columns,) float64: the middle of each patch column in milliseconds from the start of the clip.

        It is the mean of the middles of its frames. Frame i is centred at sample i * hop where frames are centred, else at
        i * hop + win_length / 2. A last column that reaches past the clip counts as whole.
        """
        mel, patch = self.frontend.mel, self.grid.patch_time
        first = 0.0 if mel.framing == "centre" else mel.win_length / 2
        frames = torch.arange(columns, dtype=torch.float64) * patch + (patch - 1) / 2
        return 1000 * (frames * mel.hop + first) / mel.sample_rate

    def pooled(self, audio: AudioBatch, layers: Sequence[int]) -> Tensor:
        """Return (len(layers), B, D') float32: the mean over time of each clip's `frames`."""
        frames = self.frames(audio, layers)
        return torch.stack([_clip_means(frames.values[layer], frames.columns) for layer in layers])

    def _check_layers(self, layers: Iterable[int]) -> None:
        wrong = [layer for layer in layers if not 1 <= layer <= self.n_layers]
        if wrong:
            raise ConfigError(
                f"layers: {self.name} has the layers 1 to {self.n_layers}; received {', '.join(map(str, wrong))}."
            )


class LogMelBaseline:
    """Features that nothing was learned for: mean and standard deviation over time of each mel bin, 2 F values a clip.

    The interface of `FrozenEncoder` as far as `clip_features` needs it; it has one layer.
    """

    def __init__(self, frontend: FrontendConfig, device: torch.device | str) -> None:
        self.frontend = frontend
        self.device = torch.device(device)
        self.name = f"log-mel statistics ({frontend.preset})"
        self.n_layers = 1
        self.least_frames = 1
        config = json.dumps(to_dict(frontend), sort_keys=True)
        self.fingerprint = hashlib.sha256(f"log-mel mean and std\0{config}".encode()).hexdigest()
        self._to_mel = Frontend(frontend)

    @torch.no_grad()
    def pooled(self, audio: AudioBatch, layers: Sequence[int]) -> Tensor:
        """Return (1, B, 2 F) float32: the means, then the standard deviations (of the clip's frames, not of a sample)."""
        if tuple(layers) != (1,):
            raise ConfigError(f"layers: {self.name} has the layer 1 only; received {list(layers)}.")
        spectrogram = _log_mel(self._to_mel, audio, self.device)
        clips = spectrogram.frames.double().split(list(spectrogram.lengths))
        return torch.stack([torch.cat([x.mean(0), x.std(0, correction=0)]) for x in clips]).float()[None]


def load_encoder(path: Path, device: torch.device | str) -> FrozenEncoder:
    """Return the encoder of a run folder (its newest checkpoint), or of a checkpoint folder, also one that
    `masktrain import` wrote. Raises CheckpointError."""
    saved, recipe = find_checkpoint(path)
    model = _built(recipe, 0)
    load_model(model, saved.tensors.get("model", {}))
    name = f"{recipe.name} ({recipe.size}), step {saved.step}"
    return FrozenEncoder(recipe, model.to(device).eval(), name, step=saved.step, path=path)


def untrained_encoder(path: Path, device: torch.device | str, seed: int) -> FrozenEncoder:
    """Return an encoder of the same config as the checkpoint's, with fresh weights drawn from `seed` and the
    checkpoint's input statistics: what training added is all that differs."""
    saved, recipe = find_checkpoint(path)
    model = _built(recipe, seed)
    trained = saved.tensors.get("model", {})
    kept = {name: trained[name] for name in trained if name.startswith("input_norm.")}
    load_model(model, {**model.state_dict(), **kept})
    name = f"{recipe.name} ({recipe.size}), untrained, seed {seed}"
    return FrozenEncoder(recipe, model.to(device).eval(), name, path=path)


def log_mel_baseline(path: Path, device: torch.device | str) -> LogMelBaseline:
    """Return the statistics of the log-mel that the encoder of a checkpoint reads."""
    return LogMelBaseline(find_checkpoint(path)[1].frontend, device)


def _built(recipe: Recipe, seed: int) -> Pretrainer:
    """Return a new model as a run with this seed starts with; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return registry.build(recipe.model, recipe.grid, recipe.input_norm)


def least_frames(recipe: Recipe) -> int:
    """Return the fewest frames that give a token: half a patch, rounded up, or a whole one where partial ones are
    dropped."""
    width = recipe.tokens.patch_time
    return width if recipe.tokens.partial == "drop" else (width + 1) // 2


def _max_columns(recipe: Recipe) -> int | None:
    """Return the patch columns of the longest clip that the encoder was trained on."""
    learned: int | None = getattr(recipe.model, "columns", None)
    data, grid = recipe.data, recipe.grid
    trained = None
    if data.target_length is not None:
        trained = grid.columns(data.target_length)
    elif data.clip_seconds is not None:
        rate = recipe.frontend.sample_rate
        trained = grid.columns(recipe.frontend.frames_for(round(data.clip_seconds * rate), rate))
    known = [columns for columns in (learned, trained) if columns is not None]
    return max(1, min(known)) if known else None


def _window_frames(frames: int, grid: TokenGrid, most: int | None) -> list[int]:
    """Return the frames of each window of a clip: all together, whole patch columns except in the last one."""
    columns = grid.columns(frames)
    if most is None or columns <= most:
        return [frames]
    windows = -(-columns // most)
    ends = [(i + 1) * columns // windows * grid.patch_time for i in range(windows - 1)]
    return [b - a for a, b in zip([0, *ends], [*ends, frames], strict=True)]


def _in_groups(spectrogram: Spectrogram) -> Iterator[Spectrogram]:
    """Yield the clips of a spectrogram, WINDOWS_AT_ONCE of them together."""
    device, start = spectrogram.frames.device, 0
    for first in range(0, len(spectrogram.lengths), WINDOWS_AT_ONCE):
        lengths = spectrogram.lengths[first : first + WINDOWS_AT_ONCE]
        yield Spectrogram(
            frames=spectrogram.frames[start : start + sum(lengths)],
            lengths=lengths,
            cu_frames=cumulative(lengths, torch.int64, device),
            clip_ids=spectrogram.clip_ids[first : first + WINDOWS_AT_ONCE],
        )
        start += sum(lengths)


def _by_column(layout: TokenLayout) -> Tensor:
    """Return the token ids (N,) of a batch clip by clip, column by column, from low to high frequency."""
    freq, start, parts = layout.grid.freq, 0, []
    for columns, tokens in zip(layout.columns, layout.lengths, strict=True):
        ids = torch.arange(start, start + tokens)
        parts.append(
            ids if layout.grid.order == "time" else ids.unflatten(0, (freq, columns)).t().reshape(-1)
        )
        start += tokens
    return torch.cat(parts)


def _clip_means(values: Tensor, lengths: Sequence[int]) -> Tensor:
    return torch.stack([clip.mean(0) for clip in values.split(list(lengths))])


def _log_mel(to_mel: Frontend, audio: AudioBatch, device: torch.device) -> Spectrogram:
    moved = replace(
        audio,
        samples=audio.samples.to(device, non_blocking=True),
        clip_ids=audio.clip_ids.to(device, non_blocking=True),
    )
    return to_mel(moved)
