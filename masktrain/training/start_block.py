# SPDX-License-Identifier: Apache-2.0
"""What a run says before its first step, and the facts about its machine that its results depend on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from masktrain import __version__
from masktrain.kernels._dispatch import Choice
from masktrain.masking.dispersion import DispersionMasking
from masktrain.masking.hint import HintConfig
from masktrain.masking.self_guided import SelfGuidedMasking
from masktrain.training.kernel_choices import kernel_choices
from masktrain.training.memory import expected_memory
from masktrain.training.run_dir import cpu_model
from masktrain.training.step_view import looks

if TYPE_CHECKING:
    from masktrain.training.distributed import World
    from masktrain.training.recipe import Recipe
    from masktrain.training.schedule import ResolvedSchedule
    from masktrain.training.trainer import Trainer


MIB = 1 << 20


def environment(world: World) -> dict[str, Any]:
    """Return what bit-exact continuation depends on: builds, device, ranks, threads, kernel choices."""
    device = world.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return {
        "masktrain": __version__,
        "torch": torch.__version__,
        "device": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "kernels": {choice.op: choice.name for choice in kernel_choices(device)},
    }


def differences_at_resume(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each fact that differs from those in the checkpoint."""
    return [
        f"{name}: the checkpoint has {saved.get(name)!r}, here it is {now.get(name)!r}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]


def start_block(trainer: Trainer) -> list[tuple[str, str]]:
    """Return (label, text) lines: what runs, on what and why so, what was scaled, what it is expected to take."""
    recipe, world, model = trainer.recipe, trainer.world, trainer.step.model
    clips, batch = len(trainer.manifest), recipe.batch_size
    per_rank = batch // world.size // recipe.train.accumulation
    layout = f"{world.size} ranks x {recipe.train.accumulation} micro-batches of {per_rank}"
    parameters = sum(p.numel() for p in model.parameters())
    held = (
        f", {len(trainer.held_out)} held out" if len(trainer.held_out) else ", none held out (under 20 clips)"
    )
    lines = [
        ("recipe", f"{recipe.name}, size {recipe.size} ({recipe.paper})"),
        ("device", _device_line(world)),
        ("precision", f"{trainer.precision.name}: {trainer.precision.reason}"),
        ("data", f"{clips} clips, {trainer.manifest.seconds / 3600:.2f} h{held}"),
        ("loader", trainer.loader_reason),
        ("input", _input_line(trainer)),
        *_augment_lines(recipe),
        *((("normalised", trainer.bins_line),) if trainer.bins_line else ()),
        *(("masking", line) for line in _masking_lines(trainer)),
        ("batch", f"{batch} clips" + (f" = {layout}" if per_rank != batch else "")),
        ("steps", f"{trainer.steps} ({trainer.steps * batch / clips:.3g} epochs of {clips} clips)"),
        *(("schedule", line) for line in trainer.schedule.describe()),
        ("optimiser", recipe.optim.describe(batch)),
        ("parameters", f"{parameters / 1e6:.2f} M"),
        (
            "memory",
            expected_memory(
                model,
                model.activation_bytes(_typical_tokens(trainer), per_rank, recipe.masking.mask_ratio),
            ).describe(),
        ),
    ]
    lines += _kernel_lines(kernel_choices(world.device))
    return lines + [("note", note) for note in trainer.spec.notes]


def _kernel_lines(choices: tuple[Choice, ...]) -> list[tuple[str, str]]:
    """Return one line for all ops with the same implementation and the same reasons."""
    groups: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        why = "; ".join(f"{name} not: {reason}" for name, reason in choice.passed_over)
        groups.setdefault((choice.name, why), []).append(choice.op)
    return [
        ("kernels", f"{name}: {', '.join(ops)}" + (f" ({why})" if why else ""))
        for (name, why), ops in groups.items()
    ]


def _augment_lines(recipe: Recipe) -> list[tuple[str, str]]:
    """Return what is drawn anew for training clips in each step, where anything is."""
    parts = [recipe.augment.describe(), recipe.frontend.describe_jitter()]
    return [("augment", f"{part}, in training alone") for part in parts if part]


def _device_line(world: World) -> str:
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name(world.device)
    else:
        name = f"CPU, {torch.get_num_threads()} of {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    return name + (f", {world.size} ranks" if world.size > 1 else "")


def _input_line(trainer: Trainer) -> str:
    frontend, data = trainer.recipe.frontend, trainer.recipe.data
    crop = "whole clips" if data.clip_seconds is None else f"clips of up to {data.clip_seconds:g} s"
    if data.padding == "reference":
        length = f"padded to {data.target_length} frames, as the reference does"
    elif data.padding == "silence":
        length = f"filled with silence to {data.clip_seconds:g} s, as the reference does"
    elif data.crop_to_batch_min:
        length = "cropped to the shortest of the batch"
    else:
        length = "packed without padding"
    return f"{frontend.sample_rate} Hz, {frontend.n_mels} mel bins ({frontend.preset}); {crop}, {length}"


def _masking_lines(trainer: Trainer) -> list[str]:
    """Return what is masked, how much of it is random over the run, and where features and scores come from."""
    grid, masking = trainer.recipe.grid, trainer.recipe.masking
    lines = [
        f"{masking.name}, {100 * masking.mask_ratio:g} % of the tokens of {grid.patch_time} frames x "
        f"{grid.patch_freq} bins, {grid.order}-major"
    ]
    if isinstance(masking, DispersionMasking | SelfGuidedMasking):
        lines.append(_hint_line(masking.hint, trainer.schedule))
    if isinstance(masking, SelfGuidedMasking):
        layers = trainer.recipe.model.encoder_layers
        layer = layers if masking.layer is None else masking.layer
        lines.append(
            f"features of encoder layer {layer} of {layers}, from all tokens, without dropout; rule {masking.rule}, cut by "
            f"{masking.bipartition}"
        )
        kept = trainer.step.scores
        lines.append(
            "scores of every step"
            if kept is None
            else f"scores kept for up to {masking.refresh_epochs} epochs, {kept.values.nbytes / MIB:.3g} MiB; random "
            "crops begin on patch columns"
        )
    if looks(masking):
        lines.append("held-out clips are evaluated under random masks of the same ratio")
    return lines


def _hint_line(hint: HintConfig, schedule: ResolvedSchedule) -> str:
    """Return how much of the mask is random when. What ends after the run's last step is left out."""
    if hint.abs_hint_ratio is not None:
        return f"hint ratio {hint.abs_hint_ratio:g} in the whole run (1 is random)"
    first = -(-hint.start_epoch * schedule.horizon // hint.epochs)
    last = hint.ratio(min(1.0, (schedule.steps - 1) / schedule.horizon))
    if first >= schedule.steps:
        return f"hint ratio 1, random masks, in the whole run: epoch {hint.start_epoch} of {hint.epochs} is not reached"
    start = (
        f"random masks before step {first + 1} (epoch {hint.start_epoch} of {hint.epochs}), then "
        if first
        else ""
    )
    return f"hint ratio: {start}1 - (epoch / {hint.epochs})^{hint.gamma:g}, {last:.3g} in the last step"


def _typical_tokens(trainer: Trainer) -> int:
    """Tokens of a clip of mean length, after the crop."""
    seconds = trainer.manifest.seconds / len(trainer.manifest)
    if trainer.recipe.data.clip_seconds is not None:
        seconds = min(seconds, trainer.recipe.data.clip_seconds)
    frontend = trainer.recipe.frontend
    return trainer.recipe.grid.tokens(
        frontend.frames_for(int(seconds * frontend.sample_rate), frontend.sample_rate)
    )
