# SPDX-License-Identifier: Apache-2.0
"""Effective rank of an encoder's representations, under masks at inference (AudioMosaic, section 4).

Each clip is one row of Z: the mean of the encoder's output over the tokens that the mask leaves. The effective rank (Roy
and Vetterli 2007) is exp of the entropy of the singular values of Z divided by their sum: from 1, all clips on one line
through the origin, up to min(clips, width). It is a sign of collapse where it is low, no measure of quality.

Z is not centred, as in the paper: a direction that all clips share counts as the largest of them. The rank of the
centred Z is reported beside it. Masks differ from clip to clip, and what they add to the spread raises the rank of any
encoder, also of an untrained one: compare under the same mask. The paper does not say how its one mask at inference combines AudioMosaic's two: here
time_frequency hides columns and rows of the same clip, and random hides the same share of the tokens unless told otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.config import to_dict
from masktrain.data.manifest import Manifest
from masktrain.data.order import order
from masktrain.errors import ConfigError
from masktrain.evaluation.encoder import FrozenEncoder, load_encoder, untrained_encoder
from masktrain.evaluation.features import clip_features
from masktrain.evaluation.labels import LabelledSet
from masktrain.masking.plan import unmasked
from masktrain.masking.strategies import RandomMasking
from masktrain.masking.time_frequency import TimeFrequencyMasking
from masktrain.training.corpus import subset
from masktrain.training.drawing import (
    INK,
    INTERPOLATION,
    LOSS,
    VALIDATION,
    new_figure,
    shortened,
    style,
    swatch,
)
from masktrain.types import AudioBatch, MaskPlan, StepKey, TokenLayout

if TYPE_CHECKING:
    from masktrain.training.drawing import Axes, Figure

Progress = Callable[[str, int, int], None]
Masks = dict[str, RandomMasking | TimeFrequencyMasking | None]

COLOURS = {"none": LOSS, "random": VALIDATION, "time_frequency": INTERPOLATION}
DASHES: tuple[Any, ...] = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def singular_values(z: Tensor) -> Tensor:
    """Return the singular values of (B, D) in descending order, float64 on the CPU."""
    return torch.linalg.svdvals(z.detach().double().cpu())


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values (Q,) divided by their sum: from 1 to Q. Values of 0 count for nothing;
    0.0 for all zeros, which the definition leaves out."""
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values[values > 0].double() / total
    return float(torch.exp(-(shares * shares.log()).sum()))


class MaskedFeatures:
    """A `FeatureSource` of one vector a clip under one mask: the mean over its visible tokens, leading ones aside.

    visible_share: of the tokens that were read so far. A clip of several windows has the same mask in those of equal
    length.
    """

    def __init__(
        self, encoder: FrozenEncoder, masking: RandomMasking | TimeFrequencyMasking | None, seed: int
    ) -> None:
        """masking: None: everything is visible. seed: of the masks, which otherwise depend on the clip alone."""
        self.encoder = encoder
        self.masking = masking
        self.name = encoder.name
        self.n_layers = encoder.n_layers
        self.device = encoder.device
        self.frontend = encoder.frontend
        self.least_frames = encoder.least_frames
        self._key = StepKey.make(seed, 0, encoder.device)
        self._plan: MaskPlan | None = None
        self._visible = self._tokens = 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the encoder's and the mask."""
        mask = [
            None if self.masking is None else [type(self.masking).name, to_dict(self.masking)],
            self._key.seed,
        ]
        return hashlib.sha256(f"{self.encoder.fingerprint}{json.dumps(mask)}".encode()).hexdigest()

    @property
    def visible_share(self) -> float:
        """Visible tokens per token."""
        return self._visible / max(1, self._tokens)

    def pooled(self, audio: AudioBatch, layers: Sequence[int]) -> Tensor:
        """Return (len(layers), B, D) float32."""
        encoder = self.encoder
        spectrogram, windows = encoder.windows(encoder.spectrogram(audio))
        encoded = encoder.encode(spectrogram, layers, self._plan_of)
        plan = self._plan
        assert plan is not None
        self._visible += sum(plan.n_visible)
        self._tokens += sum(plan.layout.lengths)
        ends = [0, *accumulate(windows)]
        counts = [sum(plan.n_visible[a:b]) for a, b in pairwise(ends)]
        out = []
        for layer in layers:
            tokens = encoded[layer].tokens
            if len(tokens) != len(plan.visible):  # a model that reads mask tokens as well
                tokens = tokens.index_select(0, plan.visible)
            out.append(torch.stack([clip.mean(0) for clip in tokens.split(counts)]))
        return torch.stack(out)

    def _plan_of(self, layout: TokenLayout) -> MaskPlan:
        self._plan = unmasked(layout) if self.masking is None else self.masking.plan(layout, self._key)
        return self._plan


@dataclass(frozen=True)
class RankConfig:
    """mask_t_prob, mask_f_prob: shares of hidden columns and rows (AudioMosaic's 0.6 and 0.4). mask_ratio: share of
    tokens hidden at random; None: as many as columns and rows together hide. clips: at most, drawn by the seed: B of the
    definition. every_layer: else the last one alone."""

    mask_t_prob: float = 0.6
    mask_f_prob: float = 0.4
    mask_ratio: float | None = None
    clips: int = 512
    every_layer: bool = False
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.clips < 2:
            raise ConfigError(f"--clips: a rank needs at least 2 clips; received {self.clips}.")
        self.masks()

    def masks(self) -> Masks:
        """Return the three masks by name."""
        both = TimeFrequencyMasking(mask_t_prob=self.mask_t_prob, mask_f_prob=self.mask_f_prob)
        ratio = both.mask_ratio if self.mask_ratio is None else self.mask_ratio
        return {"none": None, "random": RandomMasking(mask_ratio=ratio), "time_frequency": both}


def evaluate_rank(
    checkpoints: Sequence[Path],
    clips: Manifest,
    config: RankConfig,
    *,
    untrained: bool = False,
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return what the command reports: for each encoder, mask and layer the effective rank, that of the centred
    representations, and the singular values. untrained: also of the same encoders with fresh weights."""
    drawn = np.sort(order(config.seed, 0, len(clips))[: config.clips])
    chosen = subset(clips, drawn)
    if len(chosen) < 2:
        raise ConfigError(f"--data: a rank needs at least 2 clips; received {len(chosen)}.")
    units = LabelledSet(
        name="clips",
        manifest=chosen,
        labels=np.zeros(len(chosen), dtype=np.int64),
        classes=("",),
        splits=(),
        unit_seconds=None,
        metric="accuracy",
        groups=None,
        notes=(),
    )
    encoders = []
    for path in checkpoints:
        rows = [_row(path, load_encoder(path, device), units, config, progress)]
        if untrained:
            rows.append(_row(path, untrained_encoder(path, device, 0), units, config, progress))
        encoders += rows
    return {"clips": len(chosen), "of": len(clips), "config": asdict(config), "encoders": encoders}


def _row(
    path: Path, encoder: FrozenEncoder, units: LabelledSet, config: RankConfig, progress: Progress | None
) -> dict[str, Any]:
    layers = list(range(1, encoder.n_layers + 1)) if config.every_layer else [encoder.n_layers]
    ranks = []
    for name, masking in config.masks().items():
        source = MaskedFeatures(encoder, masking, config.seed)
        shown = f"{encoder.name}, mask {name}"
        advance = None if progress is None else lambda d, n, shown=shown: progress(shown, d, n)
        features = clip_features(source, units, layers=layers, batch_size=config.batch_size, progress=advance)
        for layer, z in zip(layers, features.double(), strict=True):
            values, centred = singular_values(z), singular_values(z - z.mean(0))
            ranks.append(
                {
                    "mask": name,
                    "masking": None if masking is None else to_dict(masking),
                    "visible_share": source.visible_share,
                    "layer": layer,
                    "effective_rank": effective_rank(values),
                    "effective_rank_centred": effective_rank(centred),
                    "singular_values": values.tolist(),
                }
            )
    return {
        "checkpoint": str(path),
        "name": encoder.name,
        "fingerprint": encoder.fingerprint,
        "width": encoder.width,
        "ranks": ranks,
    }


# --- the picture ---


def rank_figure(report: dict[str, Any]) -> Figure:
    """Return the singular values of the last layer, and the effective rank of each encoder or of each layer. report: of
    `evaluate_rank`."""
    encoders = report["encoders"]
    with style():
        figure = new_figure(9.6, 4.6, f"effective rank of {report['clips']} clips under masks at inference")
        spectrum, ranks = figure.subplots(1, 2, width_ratios=[1.15, 1])
        for encoder, dash in zip(encoders, _cycled(DASHES, len(encoders)), strict=True):
            last = max(row["layer"] for row in encoder["ranks"])
            for row in encoder["ranks"]:
                if row["layer"] == last:
                    _draw_spectrum(spectrum, row, dash)
        spectrum.set_yscale("log")
        spectrum.set_title("singular values of the last layer")
        spectrum.set_xlabel("index")
        spectrum.set_ylabel("share of their sum")
        spectrum.grid(True)
        if report["config"]["every_layer"]:
            _draw_layers(ranks, encoders)
        else:
            _draw_bars(ranks, encoders)
        _add_legends(figure, spectrum, encoders)
    return figure


def _cycled(values: Sequence[Any], count: int) -> list[Any]:
    return [values[i % len(values)] for i in range(count)]


def _add_legends(figure: Figure, panel: Axes, encoders: Sequence[dict[str, Any]]) -> None:
    """Name the masks by their colours and, where there are several, the encoders by their dashes."""
    handles = []
    for mask, colour in COLOURS.items():
        rows = [row for encoder in encoders for row in encoder["ranks"] if row["mask"] == mask]
        shares = sorted({f"{100 * row['visible_share']:.0f} %" for row in rows})
        handles.append(swatch(colour, f"mask {mask}: {', '.join(shares)} of the tokens visible"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    if len(encoders) > 1:
        dashes = zip(encoders, _cycled(DASHES, len(encoders)), strict=True)
        named = [panel.plot([], [], color=INK, linestyle=d, label=shortened(e["name"]))[0] for e, d in dashes]
        panel.legend(handles=named, loc="upper right")


def _draw_spectrum(panel: Axes, row: dict[str, Any], dash: Any) -> None:
    values: NDArray[np.float64] = np.array(row["singular_values"])
    shares = values / values.sum() if values.sum() > 0 else values
    panel.plot(
        np.arange(1, len(shares) + 1),
        # beyond rounding there is nothing to see
        np.where(shares > 1e-9, shares, np.nan),
        color=COLOURS[row["mask"]],
        linestyle=dash,
    )


def _draw_layers(panel: Axes, encoders: Sequence[dict[str, Any]]) -> None:
    for encoder, dash in zip(encoders, _cycled(DASHES, len(encoders)), strict=True):
        for mask, colour in COLOURS.items():
            rows = [row for row in encoder["ranks"] if row["mask"] == mask]
            layers = [row["layer"] for row in rows]
            panel.plot(
                layers,
                [row["effective_rank"] for row in rows],
                "o",
                color=colour,
                linestyle=dash,
                markersize=3,
            )
    panel.set_title("effective rank of each layer")
    panel.set_xlabel("encoder layer")
    panel.set_ylim(bottom=0)
    panel.grid(True)


def _draw_bars(panel: Axes, encoders: Sequence[dict[str, Any]]) -> None:
    height = 0.8 / len(COLOURS)
    for place, (mask, colour) in enumerate(COLOURS.items()):
        lines = np.arange(len(encoders)) + (place - 1) * height
        ranks = [row["effective_rank"] for e in encoders for row in e["ranks"] if row["mask"] == mask]
        panel.barh(lines, ranks, height=0.9 * height, color=colour)
        for line, rank in zip(lines, ranks, strict=True):
            panel.text(rank, line, f" {rank:.1f}", va="center", size=8)
    panel.set_title("effective rank of the last layer")
    panel.set_yticks(range(len(encoders)), [shortened(e["name"], 40) for e in encoders], parse_math=False)
    panel.set_ylim(len(encoders) - 0.5, -0.5)
    panel.margins(x=0.15)
    panel.set_xlabel(f"of at most {max(len(row['singular_values']) for e in encoders for row in e['ranks'])}")
    panel.set_axisbelow(True)
    panel.grid(True, axis="x")
