# SPDX-License-Identifier: Apache-2.0
"""Everything a run leaves behind but its checkpoints: config, rows, pictures, summary, and what it says meanwhile.

Only the first rank writes and speaks; the others go through the same calls.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from masktrain.errors import RunError
from masktrain.kernels.log_mel.filters import centre_frequencies
from masktrain.masking.view import View
from masktrain.training import loggers, pictures, run_dir
from masktrain.training.console import Console, duration, percent
from masktrain.training.distributed import World
from masktrain.training.drawing import save
from masktrain.training.kernel_choices import kernel_choices
from masktrain.training.metrics import Meter, check_finite, peak_flops
from masktrain.training.monitor import Reading, short_reading
from masktrain.training.run_spec import RunSpec, spec_to_json
from masktrain.types import MaskPlan, Spectrogram, StepKey, cumulative

if TYPE_CHECKING:
    from masktrain.data.loader import Loader
    from masktrain.data.manifest import BadClip
    from masktrain.training.schedule import ResolvedSchedule
    from masktrain.training.step import StepResult

ALWAYS_LOGGED = 10
SHORT_RUN = 1000
LONG_RUN_EVERY = 50
PADDING_WARNING = 0.2
MAP_PLANS = 512
# encoders of random weights have 0.04 to 0.9, trained ones 0.3 to 0.9, collapsed ones 1e-4 and less
COLLAPSED = 1e-3
ERRORS = ("error", "error_bin_mean", "error_interpolation")
LEVELS = (
    "The model predicts patches without level and contrast (norm_pix_loss). Both are interpolated in time from the "
    "visible patches or, for bins that a clip does not show at all, means over all clips."
)


@contextmanager
def run_folder(spec: RunSpec, world: World) -> Iterator[run_dir.RunDir | None]:
    """Hold the folder of a run, on the first rank: what cannot be used is refused before any work.

    Where the run ends before it has written its config, a folder that was made for it goes again.
    """
    if not world.first:
        yield None
        return
    made = not os.path.lexists(spec.out)
    run = run_dir.RunDir.reopen(spec.out) if spec.resume else run_dir.RunDir.create(spec.out)
    try:
        yield run
    finally:
        if not os.path.lexists(run.config):
            with suppress(OSError):
                (run.path / run_dir.LOCK).unlink()
                if made:
                    run.path.rmdir()
        run.close()


class Report:
    """The record of one run. Use as a context."""

    def __init__(
        self,
        spec: RunSpec,
        run: run_dir.RunDir | None,
        world: World,
        console: Console,
        manifest_digest: str,
        schedule: ResolvedSchedule,
    ) -> None:
        """run: the folder, on the first rank."""
        self.spec = spec
        self.recipe = spec.recipe
        self.world = world
        self.console = console
        self.digest = manifest_digest
        self.schedule = schedule
        self.steps = schedule.steps
        self.start = 0
        self.run = run
        self._jsonl: loggers.JsonlLogger | None = None
        self._tensorboard: loggers.TensorBoardLogger | None = None
        self._validations: loggers.JsonlLogger | None = None
        self._meter: Meter | None = None
        self._baseline: dict[str, float] = {}
        self._first_loss: float | None = None
        self._warned_padding = False
        self._last_reading = ""
        self._probe_seconds = 0.0
        self._encoder_spread: float | None = None

    def __enter__(self) -> Report:
        if self.run is not None:
            if not self.spec.resume:
                self.run.write_config(spec_to_json(self.spec, self.digest))
            if self.run.note:
                self.console.warn(self.run.note)
        self.world.barrier()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as closing:  # each is closed, also where another's disk is full
            closing.callback(self.console.close)
            for logger in (self._jsonl, self._tensorboard, self._validations):
                if logger is not None:
                    closing.callback(logger.close)

    def begin(self, block: list[tuple[str, str]], start: int, precision: str) -> None:
        """Say what runs, and open the loggers behind the `start` steps that are done. precision: of the products."""
        self.start = start
        device = self.world.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        rows = self.rows() if start else []
        self._first_loss = rows[0]["loss"] if rows else None
        for reading in self.readings() if start else []:
            if reading["step"] <= start:
                self._last_reading = short_reading(reading["probe_kind"], reading["probe_value"])
        self._meter = Meter(
            device,
            self.steps,
            peak=peak_flops(name, precision),
            devices=self.world.size,
            elapsed_s=next((r["elapsed_s"] for r in reversed(rows) if r["step"] <= start), 0.0),
        )
        if self.run is None:
            return
        self._warn_of_missing(rows, start)
        self.run.write_env(run_dir.environment(device, kernel_choices(device), self.world.size))
        self._jsonl = loggers.JsonlLogger(self.run.metrics, start)
        self._tensorboard = loggers.TensorBoardLogger(self.run.tensorboard, start)
        self._validations = loggers.JsonlLogger(self._validation_path, start)
        self.console.start_block([*block, ("out", str(self.run.path))])
        self.console.begin(self.steps, start)

    @property
    def _validation_path(self) -> Path:
        return self.spec.out / "validation.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows logged so far, without lines that somebody has damaged."""
        return [row for row in loggers.read_rows(self.spec.out / "metrics.jsonl") if is_row(row)]

    def validations(self) -> list[pictures.Validation]:
        """Return the losses of held-out clips so far, without lines that somebody has damaged."""
        names = [field.name for field in dataclasses.fields(pictures.Validation)]
        rows = loggers.read_rows(self._validation_path)
        return [
            pictures.Validation(**{name: row[name] for name in names}) for row in rows if is_validation(row)
        ]

    def _due(self, step: int) -> bool:
        """Whether a row is logged after `step` steps, the last one aside."""
        every = self.recipe.train.log_every or (1 if self.steps <= SHORT_RUN else LONG_RUN_EVERY)
        return step <= ALWAYS_LOGGED or step % every == 0

    def _warn_of_missing(self, rows: list[dict[str, Any]], start: int) -> None:
        """Name the rows up to step `start` that are not in the files: nothing depends on them but the curves."""
        wanted = {step for step in range(1, start + 1) if self._due(step)}
        validated = {
            step for step in range(start + 1) if self.schedule.milestone(step) or self.schedule.watched(step)
        }
        for name, missing in (
            ("metrics.jsonl", wanted - {row["step"] for row in rows}),
            (self._validation_path.name, validated - {v.step for v in self.validations()}),
        ):
            if start and missing:
                self.console.warn(
                    f"{name}: {len(missing)} rows up to step {start} are missing or damaged, the first that of step "
                    f"{min(missing)}; curves and summary do without them."
                )

    def stepped(
        self, done: int, result: StepResult, loader: Loader, clips: Callable[[], list[str]], last: bool
    ) -> None:
        """Take in a finished step, and log it where a row is due.

        clips: gives the paths of this rank's clips. Raises RunError when training has broken down, with the step's evidence
        saved.
        """
        assert self._meter is not None
        self._meter.add(result, loader.wait_seconds)
        if not (last or self._due(done)):
            return
        row = self._meter.row(done)
        if result.baseline:
            row |= {f"baseline_{name}": float(value) for name, value in result.baseline.items()}
        self._first_loss = row["loss"] if self._first_loss is None else self._first_loss
        if self._jsonl is not None and self._tensorboard is not None:
            self._jsonl.log(row)
            self._tensorboard.log(row)
            self.console.update({**row, "probe": self._last_reading})
        self._warn_of_padding(row)
        try:
            check_finite(row, self._first_loss, scaled=result.scaled)
        except RunError as error:
            if self.run is not None:
                evidence = self.run.path / f"breakdown_step_{done:08d}.json"
                run_dir.write_json(evidence, {"error": str(error), "row": row, "clips": clips()})
                raise RunError(f"{error} The step's numbers and clips are in {evidence}.") from error
            raise

    def _warn_of_padding(self, row: Mapping[str, Any]) -> None:
        if row["padding_share"] > PADDING_WARNING and not self._warned_padding:
            self._warned_padding = True
            self.console.warn(
                f"{100 * row['padding_share']:.0f} % of the tokens are padding, which is attended and counted as "
                "the reference does; --data.padding none packs the clips instead."
            )

    def paused(self) -> AbstractContextManager[None]:
        """Return a context that is left out of the rates."""
        assert self._meter is not None
        return self._meter.paused()

    def validated(
        self, validation: pictures.Validation, drawn: list[pictures.Reconstruction], *, say: bool
    ) -> None:
        """Log losses and errors of held-out clips, draw them, and say them on the console."""
        assert self._meter is not None
        if self.run is None or self._validations is None or self._tensorboard is None:
            return
        with self._meter.paused():
            step = validation.step
            self._validations.log(dataclasses.asdict(validation))
            scalars = {f"val_{name}": value for name, value in validation.parts.items()}
            if validation.error is not None:
                scalars["val_error"] = validation.error
            self._tensorboard.log({"step": step, "val_loss": validation.loss, **scalars})
            if say:
                self.console.note(held_out_line(validation))
            if drawn:
                figure = pictures.reconstruction_figure(
                    drawn,
                    self._axes(),
                    f"{self.recipe.name}, {self.recipe.size}: held-out clips after {step} steps",
                    self.recipe.tokens.patch_time,
                    LEVELS if getattr(self.recipe.objective, "norm_pix_loss", False) else "",
                )
                png = save(figure, self.run.pictures / f"reconstruction_{step:08d}.png")
                self._tensorboard.picture("reconstruction", step, png)

    def watched(self, step: int, spread: float | None) -> None:
        """Log the spread of the encoder's outputs, and warn where it has collapsed since the last look.

        spread: as `Validator.encoder_spread` gives it.
        """
        if spread is None or self._tensorboard is None:
            return
        if step > self.start:
            self._tensorboard.log({"step": step, "encoder_spread": spread})
        if collapsed(spread) and not collapsed(self._encoder_spread):
            self.console.warn(
                f"after {step} steps the encoder says the same of every token (spread {spread:.2g}; 0 is the same, "
                "trained encoders have 0.3 or more): it has collapsed, and only the decoder still learns. Start again "
                "with a lower --optim.lr or a longer --schedule.warmup-steps; --init-from takes the weights of an "
                "earlier checkpoint."
            )
        self._encoder_spread = spread

    def probed(self, reading: Reading) -> None:
        """Log a reading of the model on labelled clips, and say it and what the readings cost so far.

        It has a line of its own in metrics.jsonl: the rows of the steps are those of a run without.
        """
        assert self._meter is not None
        self._last_reading = short_reading(reading.kind, reading.value)
        self._probe_seconds += reading.seconds
        if self._jsonl is None or self._tensorboard is None:
            return
        row = reading.row(math.fsum(r["probe_seconds"] for r in self.readings()), self._meter.elapsed_s)
        self._jsonl.log(row)
        named = {f"probe_{reading.kind}_{reading.metric}": reading.value}
        self._tensorboard.log({**named, **{n: row[n] for n in ("step", "probe_seconds", "probe_share")}})
        share = f", {percent(row['probe_share'])} of the run so far" if reading.step else ""
        self.console.note(f"{reading.sentence}; {duration(reading.seconds)} spent on it{share}")

    def readings(self) -> list[dict[str, Any]]:
        """Return the lines of the probe logged so far, without those that somebody has damaged."""
        rows = loggers.read_rows(self.spec.out / "metrics.jsonl")
        return [row for row in rows if is_reading(row)]

    def _axes(self) -> pictures.MelAxes:
        frontend = self.recipe.frontend
        return pictures.MelAxes(centre_frequencies(frontend.mel).numpy(), 1 / frontend.frame_rate)

    def draw_mask_rate(self, frames: int) -> None:
        """Draw how often the strategy masks each token of a clip of `frames` frames: a strategy's bias shows here."""
        if self.run is None or not self.recipe.train.pictures:
            return
        lengths = (frames,) * MAP_PLANS
        none = torch.zeros(0, self.recipe.frontend.n_mels)
        spectrogram = Spectrogram(
            none, lengths, cumulative(lengths, torch.int64, "cpu"), torch.arange(MAP_PLANS)
        )
        view = View(1.0, spectrogram, none.new_zeros(1), none.new_ones(1))
        plan = self.recipe.masking.plan(
            self.recipe.grid.layout(spectrogram), StepKey.make(self.recipe.seed, 0, "cpu"), 0, view
        )
        self._draw_mask_rate([plan], f"over {MAP_PLANS} clips")

    def draw_mask_rate_of(self, plans: Callable[[], Iterable[MaskPlan]], done: int) -> None:
        """Draw the same for a strategy that looks at clips. plans: draws masks of held-out clips as the step after `done`
        would."""
        if self.run is None or not self.recipe.train.pictures:
            return
        self._draw_mask_rate(plans(), f"after {done} steps")

    def _draw_mask_rate(self, plans: Iterable[MaskPlan], text: str) -> None:
        assert self.run is not None
        rate = pictures.MaskRate(self.recipe.grid.freq)
        for plan in plans:
            for grid in pictures.mask_grids(plan):
                rate.add(grid)
        figure = pictures.mask_rate_figure(
            rate,
            self._axes(),
            self.recipe.tokens.patch_time,
            self.recipe.tokens.patch_freq,
            f"{self.recipe.name}: mask rate of {self.recipe.masking.name}, {text}",
        )
        save(figure, self.run.pictures / "mask_rate.png")

    def finish(
        self, done: int, bad: Sequence[BadClip], notes: Mapping[str, int], summary_json: Path | None
    ) -> None:
        """Draw the curves, write the summary and say how the run ended. bad: clips left out or replaced."""
        if self.run is None:
            return
        self.console.close()
        rows = self.rows()
        validations = self.validations()
        if rows and self.recipe.train.pictures:
            title = f"{self.recipe.name}, {self.recipe.size}, {self.recipe.train.steps or done} steps"
            save(pictures.loss_figure(rows, validations, title), self.run.pictures / "loss.png")
            save(pictures.throughput_figure(rows, title), self.run.pictures / "throughput.png")
            if any(v.error is not None for v in validations):
                figure = pictures.error_figure({"held-out clips": validations}, title)
                save(figure, self.run.pictures / "error.png")
        summary = summarise(rows, validations, done, self.steps)
        summary |= {
            "recipe": self.recipe.name,
            "size": self.recipe.size,
            "encoder_spread": self._encoder_spread,
            "bad_clips": [dataclasses.asdict(clip) for clip in bad],
            "clip_notes": dict(notes),
            "seconds": self._meter.elapsed_s if self._meter else 0.0,
            "validation_seconds": self._meter.paused_seconds - self._probe_seconds if self._meter else 0.0,
        }
        if readings := self.readings():
            summary["probe"] = readings
        self.run.write_summary(summary)
        if summary_json is not None:
            run_dir.write_json(summary_json, summary)
        self.console.finish(ending(summary, self.run.path))


def collapsed(spread: float | None) -> bool:
    """Whether an encoder of this spread says the same of every token. None, an unknown one, is not taken for collapsed."""
    return spread is not None and spread < COLLAPSED


def is_number(value: Any, *, or_null: bool = False) -> bool:
    """Whether a value of a row is a number, or the null that stands for NaN."""
    return (or_null and value is None) or (isinstance(value, int | float) and not isinstance(value, bool))


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is as this class writes it."""
    return all(is_number(row.get(name)) for name in ("step", "elapsed_s", "peak_memory_gib")) and all(
        is_number(value, or_null=True) for name, value in {"loss": "", **row}.items() if name != "nonfinite"
    )


def is_reading(row: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is a reading of the probe."""
    return all(is_number(row.get(f"probe_{name}")) for name in ("value", "chance", "seconds")) and all(
        isinstance(row.get(f"probe_{name}"), str) for name in ("kind", "metric")
    )


def is_validation(row: Mapping[str, Any]) -> bool:
    """Whether a line of validation.jsonl is as this class writes it."""
    parts = [row.get("parts"), row.get("baseline_parts")]
    numbers = [row.get(name) for name in ("step", "loss", "baseline")]
    numbers += [value for part in parts if isinstance(part, dict) for value in part.values()]
    return (
        all(isinstance(part, dict) for part in parts)
        and all(map(is_number, numbers))
        and all(name in row and is_number(row[name], or_null=True) for name in ERRORS)
    )


def summarise(
    rows: list[dict[str, Any]], validations: list[pictures.Validation], done: int, steps: int
) -> dict[str, Any]:
    """Return what summary.json says of the losses.

    loss_first: mean of steps 2 to 6. loss_last: mean of the last tenth of the steps done. loss_baseline: of the
    predictor that knows each mel bin's mean, on the clips of steps 2 to 6. error and its two references: of the last
    evaluation of the held-out clips.
    """
    first = [row for row in rows if 2 <= row["step"] <= 6]
    last = [row for row in rows if row["step"] > done - max(1, done // 10)]
    summary: dict[str, Any] = {
        "complete": done == steps,
        "steps": done,
        "steps_planned": steps,
        "loss_first": mean_of(first, "loss"),
        "loss_last": mean_of(last, "loss"),
        "loss_baseline": mean_of(first, "baseline_loss"),
        "clips_per_s": median_of(rows, "clips_per_s"),
        "data_wait_share": median_of(rows, "data_wait_share"),
        "peak_memory_gib": max((row["peak_memory_gib"] for row in rows), default=None),
    }
    for name in sorted(
        {name for row in last for name in row if name.startswith("loss_") and name != "loss_max"}
    ):
        part = name.removeprefix("loss_")
        summary[f"first_{part}"] = mean_of(first, name)
        summary[f"last_{part}"] = mean_of(last, name)
        summary[f"baseline_{part}"] = mean_of(first, f"baseline_{part}")
    if validations:
        summary["validation"] = [dataclasses.asdict(v) for v in validations]
        summary |= {name: getattr(validations[-1], name) for name in ERRORS}
    return summary


def held_out_line(validation: pictures.Validation) -> str:
    """Return what the console says of an evaluation."""
    line = f"held-out clips after {validation.step} steps: loss {validation.loss:.4g} (per-bin mean {validation.baseline:.4g})"
    return line if validation.error is None else f"{line}; {errors_of(dataclasses.asdict(validation))}"


def errors_of(numbers: Mapping[str, Any]) -> str:
    """Return the squared errors of masked values in words. numbers: with those of ERRORS."""
    return (
        f"squared error of masked cells {numbers['error']:.4g}, interpolated in time "
        f"{numbers['error_interpolation']:.4g}, per-bin mean {numbers['error_bin_mean']:.4g}"
    )


def probe_ending(readings: Sequence[Mapping[str, Any]]) -> str:
    """Return how the readings of the probe went and what they cost. readings: lines of metrics.jsonl."""
    first, last = readings[0], readings[-1]
    seconds = math.fsum(row["probe_seconds"] for row in readings)
    return (
        f"{last['probe_kind']} {last['probe_metric']} {100 * first['probe_value']:.1f} % after {first['step']} steps -> "
        f"{100 * last['probe_value']:.1f} % after {last['step']}, chance {100 * last['probe_chance']:.1f} %; "
        f"{len(readings)} readings took {duration(seconds)}. No checkpoint was chosen by it"
    )


def mean_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """Return the mean of a column over the rows that have it, None where none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return math.fsum(values) / len(values) if values else None


def median_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """Return the median of a column over the rows that have it, None where none has."""
    values = sorted(row[name] for row in rows if row.get(name) is not None)
    return values[len(values) // 2] if values else None


def ending(summary: Mapping[str, Any], path: Path) -> list[tuple[str, str]]:
    """Return the lines that close a run."""
    lines = []
    if summary["complete"]:
        lines.append(("done", f"{summary['steps']} steps in {summary['seconds']:.0f} s"))
    else:
        lines.append(("stopped", f"at step {summary['steps']} of {summary['steps_planned']}, saved"))
        lines.append(("go on", f"masktrain run --resume {path}"))
    if summary["loss_first"] and summary["loss_last"] is not None and summary["loss_baseline"] is not None:
        change = 100 * (1 - summary["loss_last"] / summary["loss_first"])
        lines.append(
            (
                "loss",
                f"{summary['loss_first']:.4g} (steps 2 to 6) -> {summary['loss_last']:.4g} (last tenth), {change:.0f} % "
                f"lower; predicting the per-bin mean: {summary['loss_baseline']:.4g}",
            )
        )
    if summary.get("error") is not None:
        lines.append(("error", errors_of(summary)))
    if collapsed(summary.get("encoder_spread")):
        lines.append(
            ("encoder", f"collapsed (spread {summary['encoder_spread']:.2g}): its weights are of no use")
        )
    if summary.get("probe"):
        lines.append(("probe", probe_ending(summary["probe"])))
    if summary["bad_clips"]:
        lines.append(
            (
                "bad clips",
                f"{len(summary['bad_clips'])}, left out or replaced by others; summary.json names them",
            )
        )
    for note, count in summary["clip_notes"].items():
        lines.append(("clips", f"{count} {note}"))
    lines.append(("run", json.dumps(str(path))[1:-1]))
    return lines
