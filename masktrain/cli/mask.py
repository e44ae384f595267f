# SPDX-License-Identifier: Apache-2.0
"""`masktrain mask show`: what each masking strategy would mask in a clip."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from masktrain.cli.options import check_writable, override, parse_known
from masktrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from masktrain.masking.registry import Strategy
    from masktrain.training.recipe import Recipe

ACTIONS = ("show",)
USAGE = """usage: masktrain mask show AUDIO [AUDIO ...] [--masking A,B,C] [-o masks.png]

`masktrain mask show --help` shows all options.
"""
RECIPE = "mae_ast_patch"
MOST_ROWS = 40
MOST_HINTS = 8


@dataclass(frozen=True)
class Options:
    """Draw the start of each clip and, for each masking strategy, its scores and its masks at several hint ratios.

    Fields of a strategy are options under its name: --self-guided.rule s1_code --dispersion.mask-ratio 0.8. A strategy
    without hints is shown by as many draws, and by how often it masks each token. Clips are read and cut as in the recipe.
    """

    audio: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Audio files; one picture shows all."""
    masking: str = "random,inverse_block,dispersion,self_guided"
    """Names of strategies with commas between, or all that fit the recipe."""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("masks.png")
    """The picture to write (PNG); one that exists is replaced."""
    recipe: str | None = None
    """Whose log-mel, tokens and masked share are taken; default mae_ast_patch, or that of --checkpoint."""
    size: str = "tiny"
    """Named size of the untrained encoder: tiny, small or base."""
    checkpoint: Path | None = None
    """A run or one of its checkpoints, whose encoder supplies the features of self-guided masking; without it, an untrained
    encoder does."""
    hint: str = "0,0.5,1"
    """Hint ratios from 0 (the strategy's own mask) to 1 (random), with commas between."""
    seed: int = 0
    """Seed of the masks."""


def main(arguments: list[str]) -> None:
    """Run `masktrain mask ACTION`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    action = arguments[0]
    if action not in ACTIONS:
        raise ConfigError(
            f"mask: no action {action!r}.{nearest(action, ACTIONS)} Allowed: {', '.join(ACTIONS)}."
        )
    _show(arguments[1:])


def _show(arguments: list[str]) -> None:
    options, rest = parse_known(Options, "mask show", arguments)
    if not options.audio:
        raise ConfigError("mask show: no audio file was named. `masktrain mask show clip.wav -o masks.png`.")
    if options.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {options.out}: expected a name ending in .png.")
    check_writable(options.out, "--out")
    if not 0 <= options.seed < 1 << 48:
        raise ConfigError(f"--seed: must lie in [0, 2^48); received {options.seed}.")
    if options.recipe is not None and options.checkpoint is not None:
        raise ConfigError(
            "--recipe and --checkpoint: a checkpoint brings its own recipe; give one of the two."
        )
    hints = _hints(options.hint)

    from masktrain.recipes import find
    from masktrain.training.console import Console
    from masktrain.training.drawing import save
    from masktrain.training.mask_pictures import (
        load_encoder,
        masks_figure,
        read_clip,
        strategy_row,
        untrained_encoder,
    )

    encoder = load_encoder(options.checkpoint) if options.checkpoint else None
    recipe = encoder.recipe if encoder else find(options.recipe or RECIPE, options.size)
    chosen = _strategies(recipe, options.masking, rest)
    rows = len(options.audio) * (1 + len(chosen))
    if rows > MOST_ROWS:
        raise ConfigError(
            f"mask show: {len(options.audio)} clips with {len(chosen)} strategies make {rows} rows, and one picture holds "
            f"{MOST_ROWS}. Draw fewer clips or strategies at a time."
        )
    wants_features = [masking.name for masking in chosen if masking.needs == "features"]
    if encoder is None and wants_features:
        encoder = untrained_encoder(recipe)
    clips = [read_clip(path, recipe, encoder, number) for number, path in enumerate(options.audio)]
    drawn = [
        (clip, [strategy_row(masking, clip, hints, options.seed) for masking in chosen]) for clip in clips
    ]
    notes = [f"recipe {recipe.name}"]
    if wants_features:
        assert encoder is not None
        source = "" if encoder.trained else " (fresh weights: --checkpoint takes those of a run)"
        notes.append(f"features of {', '.join(wants_features)}: {encoder.name}{source}")
    if not (encoder and encoder.trained) and recipe.input_norm.kind != "global":
        notes.append("input normalised by the clip's own statistics")
    figure = masks_figure(drawn, recipe, len(hints), f"Masks of {recipe.name}", "; ".join(notes))
    save(figure, options.out)
    with Console() as console:
        console.finish(
            [
                (
                    "written",
                    f"{options.out}: {len(clips)} clip{'s' * (len(clips) > 1)}, {len(chosen)} strategies",
                )
            ]
        )


def _hints(text: str) -> tuple[float, ...]:
    try:
        hints = tuple(float(part) for part in text.split(","))
    except ValueError:
        hints = ()
    if not hints or not all(math.isfinite(h) and 0 <= h <= 1 for h in hints) or len(hints) > MOST_HINTS:
        raise ConfigError(
            f"--hint: expected 1 to {MOST_HINTS} numbers from 0 to 1 with commas between, such as 0,0.5,1; received "
            f"{text!r}."
        )
    return hints


def _strategies(recipe: Recipe, names: str, rest: list[str]) -> list[Strategy]:
    """Return the strategies as `masktrain run` would put them on the recipe, with the options given under their names."""
    from masktrain.masking.registry import STRATEGIES, strategy
    from masktrain.training import masking_fit

    def adopted(cls: type[Strategy]) -> Strategy:
        on_recipe = recipe if isinstance(recipe.masking, cls) else masking_fit.put(recipe, cls)
        masking_fit.check(on_recipe, ranks=1)
        return on_recipe.masking

    found: dict[str, Strategy] = {}
    for name in STRATEGIES if names == "all" else names.split(","):
        try:
            found[name.strip()] = adopted(strategy(name.strip()))
        except ConfigError:
            # of all strategies, those that fit
            if names != "all":
                raise
    together = dataclasses.make_dataclass(
        "Strategies", [(name, type(masking)) for name, masking in found.items()], frozen=True
    )
    adjusted = override(together(**found), "mask show", rest, Options)
    chosen: list[Strategy] = [getattr(adjusted, name) for name in found]
    for masking, before in zip(chosen, found.values(), strict=True):
        if getattr(masking, "hint", None) != getattr(before, "hint", None):
            raise ConfigError(
                f"--{masking.name.replace('_', '-')}.hint: the picture shows the ratios of --hint, not a schedule. Give "
                "--hint 0,0.5,1."
            )
        masking_fit.check(dataclasses.replace(recipe, masking=masking), ranks=1)
    return chosen
