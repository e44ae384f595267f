# SPDX-License-Identifier: Apache-2.0
"""The loop: data, model and optimiser put together, steps, checkpoints, and the end of the run.

What a run computes is decided by its RunSpec and its clips; a resumed run takes up the state of its newest valid
checkpoint and computes the same from there on.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from masktrain.config import differences, from_dict, to_dict
from masktrain.data.bad_clips import BadClips
from masktrain.data.loader import Loader, make_loader
from masktrain.data.manifest import Manifest
from masktrain.data.order import check_shards
from masktrain.errors import CheckpointError, ConfigError, DataError, RunError
from masktrain.models import registry
from masktrain.training import (
    checkpoint,
    corpus,
    distributed,
    masking_fit,
    optim,
    precision,
    schedule,
    score_cache,
)
from masktrain.training.console import Console
from masktrain.training.monitor import Monitor
from masktrain.training.recipe import Recipe
from masktrain.training.report import Report, run_folder
from masktrain.training.run_dir import RunDir
from masktrain.training.run_spec import RunSpec, stored_manifest_digest
from masktrain.training.start_block import differences_at_resume, environment, start_block
from masktrain.training.statistics import Measured, measure_statistics
from masktrain.training.step import Step
from masktrain.training.step_view import looks
from masktrain.training.stop import StopRequest
from masktrain.training.validation import Validator
from masktrain.types import AudioBatch

CALIBRATION_STEPS = 6


def train(spec: RunSpec, summary_json: Path | None = None, monitor: Monitor | None = None) -> None:
    """Run a recipe to its end, or until it is asked to stop. Raises MasktrainError for what the user can act on.

    monitor: reads the model now and then; the run does not depend on it.
    """
    world = distributed.join(spec.device)
    console = Console(enabled=world.first)
    try:
        # a default name holds the time: the first rank's serves all
        spec = replace(spec, out=Path(str(world.gather_objects(str(spec.out))[0])))
        with corpus.log_lines(console), run_folder(spec, world) as folder:
            trainer = Trainer(spec, world, console, monitor)
            with StopRequest() as stop:
                trainer.fit(folder, stop, summary_json)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        raise RunError(
            f"Not enough memory ({str(error).splitlines()[0][:200]}). Take a smaller --batch-size or --size, shorter "
            "clips (--data.clip-seconds), or more --train.accumulation."
        ) from error
    finally:
        distributed.leave()


def _out_of_memory(error: Exception) -> bool:
    told = ("DefaultCPUAllocator", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in told)


class Trainer:
    """One run on one rank of the world."""

    def __init__(
        self, spec: RunSpec, world: distributed.World, console: Console, monitor: Monitor | None = None
    ) -> None:
        check_shards(spec.recipe.batch_size, world.size, spec.recipe.train.accumulation)
        masking_fit.check(spec.recipe, world.size)
        self.world = world
        self.console = console
        self.monitor = monitor
        self.precision = precision.choose(spec.recipe.train.precision, world.device)
        # clips that no record of a training loader holds: left out at the start, or held out and bad
        manifest, self.other_bad = corpus.read_corpus(spec.data, world, self.console)
        self.digest = manifest.digest
        if spec.resume and stored_manifest_digest(spec.out) != self.digest:
            raise ConfigError(
                f"--resume {spec.out}: the clips are not those the run was started with (a path, length or the "
                "order changed). Restore the data, or start a new run with --init-from for its weights."
            )
        self.manifest, self.held_out = corpus.split(manifest, spec.recipe)
        self.spec = self._calibrated(spec) if spec.minutes is not None else spec
        self.recipe = self.spec.recipe
        self._check_length()
        self.steps = self.recipe.train.steps or self.recipe.schedule.total_steps
        self.schedule = schedule.resolve(
            self.recipe.schedule, self.steps, self.recipe.optim.peak_lr(self.recipe.batch_size)
        )
        self.step = self._new_step(self.recipe, self.schedule)
        self.bins_line: str | None = None
        if not spec.resume:
            self._first_state()
        self.loader, self.loader_reason = self._new_loader(self.manifest, self.recipe, self.world)

    def _check_length(self) -> None:
        """Raise ConfigError where padded clips would have no two tokens, one to see and one to predict."""
        data = self.recipe.data
        if data.padding == "reference" and self.recipe.grid.tokens(data.target_length or 0) < 2:
            raise ConfigError(
                f"data.target_length: {data.target_length} frames hold fewer than 2 tokens of "
                f"{self.recipe.tokens.patch_time} frames; raise it."
            )

    def _most_columns(self, recipe: Recipe) -> int:
        """Return the time columns of the longest clip that a step can meet."""
        data, frontend = recipe.data, recipe.frontend
        if data.padding == "reference":
            return recipe.grid.columns(data.target_length or 0)
        longest = max(float(clips.durations.max(initial=0)) for clips in (self.manifest, self.held_out))
        seconds = longest if data.clip_seconds is None else min(longest, data.clip_seconds)
        if data.padding == "silence":
            seconds = data.clip_seconds or 0.0
        samples = round(seconds * frontend.sample_rate)
        return recipe.grid.columns(frontend.frames_for(samples, frontend.sample_rate))

    def _new_step(self, recipe: Recipe, resolved: schedule.ResolvedSchedule) -> Step:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
        model.check_columns(self._most_columns(recipe))
        model.to(self.world.device)
        kept = score_cache.wanted(recipe)
        return Step(
            recipe,
            model,
            optim.build(model, recipe.optim, resolved.lr),
            resolved,
            self.world,
            self.precision,
            score_cache.ScoreCache(recipe, self.manifest, self.world.device) if kept else None,
        )

    def _new_loader(self, manifest: Manifest, recipe: Recipe, world: distributed.World) -> tuple[Loader, str]:
        frontend = recipe.frontend
        return make_loader(
            manifest,
            recipe.data,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            rank=world.rank,
            world_size=world.size,
            accumulation=recipe.train.accumulation,
            min_samples=lambda rate: frontend.min_samples(rate, recipe.tokens.patch_time),
            pin_memory=world.device.type == "cuda",
            column=partial(score_cache.column_samples, recipe) if score_cache.wanted(recipe) else None,
        )

    def _calibrated(self, spec: RunSpec) -> RunSpec:
        """Turn a run length in minutes into steps: a few throw-away steps are timed, the slowest rank decides."""
        assert spec.minutes is not None
        recipe = spec.recipe
        trial = schedule.resolve(recipe.schedule, CALIBRATION_STEPS, recipe.optim.peak_lr(recipe.batch_size))
        step = self._new_step(recipe, trial)
        loader, _ = self._new_loader(self.manifest, recipe, self.world)
        ends = []
        try:
            for number, audio in zip(range(CALIBRATION_STEPS), loader.iterate(0), strict=False):
                float(step(number, audio).loss)
                ends.append(time.monotonic())
        finally:
            loader.close()
        mine = int(1e6 * (ends[-1] - ends[0]) / (len(ends) - 1))
        seconds = self.world.max_host([mine])[0] / 1e6
        steps = max(20, int(60 * spec.minutes / seconds))
        note = f"{steps} steps: {seconds:.3g} s a step were measured, for --minutes {spec.minutes:g}"
        return replace(
            spec,
            recipe=replace(recipe, train=replace(recipe.train, steps=steps)),
            minutes=None,
            notes=(*spec.notes, note),
        )

    def _first_state(self) -> None:
        """Give the model what it has before the first step beside its random weights."""
        if self.spec.init_from:
            self._init_from(self.spec.init_from)
        elif self.recipe.input_norm.kind == "per_bin":
            self._measure_bins()

    def _measure_bins(self) -> None:
        """Measure mean and standard deviation of each mel bin of the training clips, on the first rank for all."""
        config, clips = self.recipe.input_norm, len(self.manifest)
        measured: Measured | DataError | None = None
        if self.world.first:
            try:
                with self.console.progress("measuring mel bins") as advance:
                    measured = measure_statistics(
                        self.manifest,
                        self.recipe.frontend,
                        clips=min(config.measured_clips, clips),
                        clip_seconds=self.recipe.data.clip_seconds,
                        seed=self.recipe.seed,
                        progress=advance,
                    )
            except DataError as error:  # the other ranks wait for an answer
                measured = error
        measured = cast(Measured | DataError, self.world.gather_objects(measured)[0])
        if isinstance(measured, DataError):
            raise measured
        found = measured.statistics
        self.step.model.input_norm.set_bins(torch.tensor(found.bin_mean), torch.tensor(found.bin_std))
        self.bins_line = (
            f"mean and deviation of each of the {len(found.bin_std)} mel bins, measured on {measured.clips} of "
            f"{clips} clips"
        )
        low = [number for number, std in enumerate(found.bin_std) if std < config.std_floor]
        if low:
            shown = ", ".join(map(str, low[:8])) + (", ..." if len(low) > 8 else "")
            self.bins_line += (
                f"; {len(low)} bins are divided by input_norm.std_floor {config.std_floor:g} instead"
            )
            self.console.warn(
                f"mel bins with a standard deviation under {config.std_floor:g}: {len(low)} of {len(found.bin_std)} "
                f"({shown}); silence, an empty filter or a low-passed corpus. See input_norm.std_floor."
            )

    def _init_from(self, path: Path) -> None:
        """Load the weights of a run folder's newest checkpoint, or of one checkpoint folder."""
        if os.path.isdir(path / "checkpoints"):
            found = checkpoint.latest(path / "checkpoints")
            if found.checkpoint is None:
                raise CheckpointError(
                    f"--init-from {path}: holds no valid checkpoint. {' '.join(found.damaged)}"
                )
            saved = found.checkpoint
        elif os.path.isdir(path):
            saved = checkpoint.load(path)
        else:
            raise CheckpointError(
                f"--init-from {path}: no such folder; name a run or one of its checkpoints."
            )
        try:
            recipe = from_dict(Recipe, saved.data["recipe_config"], "recipe")
        except (KeyError, TypeError, OverflowError, ConfigError) as error:
            raise CheckpointError(
                f"--init-from {path}: does not say what it was trained on ({error})."
            ) from error
        # the same shapes may stand for other things: 16 x 16 patches and frames of 128 bins in pairs, say
        differing = [
            f"{part}.{name}: the weights have {theirs}, this run {ours}"
            for part, theirs_of, ours_of in (
                ("frontend.mel", recipe.frontend.mel, self.recipe.frontend.mel),
                ("tokens", recipe.tokens, self.recipe.tokens),
            )
            for name, theirs, ours in differences(theirs_of, ours_of)
        ]
        for name in ("heads", "decoder_heads", "norm", "positions", "decoder_positions"):
            has, wants = (getattr(model, name, None) for model in (recipe.model, self.recipe.model))
            differing += [f"model.{name}: the weights have {has}, this run {wants}"] if has != wants else []
        if differing:
            raise CheckpointError(
                f"--init-from {path}: the weights of {recipe.name} were trained on another input or model. "
                f"{'; '.join(differing)}. Give this run the same values, or start without --init-from."
            )
        try:
            checkpoint.load_model(self.step.model, saved.tensors.get("model", {}))
        except CheckpointError as error:
            raise CheckpointError(f"--init-from {path}: {error}") from error
        self.console.note(f"Weights of {recipe.name} after {saved.step} steps, from {saved.path}.")
        if self.recipe.input_norm.kind == "per_bin":
            self.bins_line = "mean and deviation of each mel bin, as the weights of --init-from bring them"

    def fit(self, folder: RunDir | None, stop: StopRequest, summary_json: Path | None) -> None:
        """Train to the end, save, and write pictures and summary. folder: the run's, on the first rank."""
        try:
            with Report(self.spec, folder, self.world, self.console, self.digest, self.schedule) as report:
                start = self._resume() if self.spec.resume else 0
                lines = self.monitor.describe(self.manifest, self.steps) if self.monitor else []
                block = [*start_block(self), *(("probe", line) for line in lines)]
                report.begin(block, start, self.precision.name)
                saver = checkpoint.AsyncSaver(self.spec.out / "checkpoints", self.recipe.train.keep_last)
                with saver:
                    done = self._steps(report, saver, stop, start)
                record = self._record()[0]
                notes = Counter({text: count for text, (count, _) in record.notes().items()})
                for passed_on in self.world.gather_objects(self.loader.passed_on()):
                    notes.update(cast(dict[str, int], passed_on))
                report.finish(done, [*self.other_bad, *record.bad()], notes, summary_json)
        finally:
            self.loader.close()

    def _steps(self, report: Report, saver: checkpoint.AsyncSaver, stop: StopRequest, start: int) -> int:
        """Do the steps that are left and return how many are done."""
        validator = self._validator()
        every = self.recipe.train.checkpoint_every or max(1, self.steps // 10)
        if start == 0:
            if not looks(self.recipe.masking):
                report.draw_mask_rate(max(validator.spectrograms[0].lengths))
            self._evaluate(report, validator, 0)
            self._probe(report, 0)
        else:
            self._watch_encoder(report, validator, start)
        if start == self.steps:
            return start
        done = start
        for audio in self.loader.iterate(start):
            result = self.step(done, audio, stop=stop.requested, baseline=2 <= done + 1 <= 6)
            done += 1
            last = done == self.steps or result.stop
            report.stepped(done, result, self.loader, partial(self._paths, audio), last)
            if self.schedule.milestone(done) or self.schedule.watched(done):
                self._evaluate(report, validator, done)
            self._probe(report, done)
            if done % every == 0 or last:
                self._save(saver, done)
                self._watch_encoder(report, validator, done)
            saver.check()
            if last:
                break
        return done

    def _evaluate(self, report: Report, validator: Validator, done: int) -> None:
        """Evaluate the held-out clips, and let a plateau schedule see their loss; pictures at milestones alone."""
        milestone = self.schedule.milestone(done)
        with report.paused():
            validation, drawn = validator(done, draw=milestone)
            if milestone and looks(self.recipe.masking):
                report.draw_mask_rate_of(partial(validator.plans_of_training, done), done)
        report.validated(validation, drawn, say=milestone)
        plateau = self.step.plateau
        if plateau is None or not self.schedule.watched(done):
            return
        # every rank takes the first one's value: those of other devices may differ in their last bits
        loss = self.world.gather_objects(validation.loss)[0]
        assert isinstance(loss, float)
        if plateau.watch(loss) and done < self.steps:
            self.console.note(
                f"learning rate {self.schedule.lr_at(done, plateau.reduction):.3g} from step {done + 1} on: the loss of "
                f"the held-out clips has not improved in {plateau.config.patience + 1} evaluations"
            )

    def _watch_encoder(self, report: Report, validator: Validator, done: int) -> None:
        """See whether the encoder of a checkpoint is worth anything, on the first rank."""
        if self.world.first:
            with report.paused():
                spread = validator.encoder_spread()
            report.watched(done, spread)

    def _probe(self, report: Report, done: int) -> None:
        """Read the model on labelled clips where that is due, on the first rank; the others wait at the next step."""
        if self.monitor is None or not self.world.first or not self.monitor.due(done, self.steps):
            return
        if any(reading["step"] == done for reading in report.readings()):
            return  # a run that was killed before its first checkpoint starts again
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # what is left of the step is no cost of the reading
        try:
            with report.paused():
                reading = self.monitor.read(self.step, done)
        except DataError as error:
            if not done:
                raise
            self.console.warn(f"no reading of the probe after {done} steps: {error}")  # the training goes on
            return
        report.probed(reading)

    def _record(self) -> tuple[BadClips, list[Any]]:
        """Return the record of bad clips of all ranks, and the state of each. Raises DataError for too many."""
        states: list[Any] = self.world.gather_objects(self.loader.bad.state())
        record = BadClips(self.manifest)
        for state in states:
            record.load_state(state)
        return record, states

    def _paths(self, audio: list[AudioBatch]) -> list[str]:
        return [self.manifest.path(clip) for micro in audio for clip in micro.clip_ids.tolist()]

    def _validator(self) -> Validator:
        """Read the held-out clips once; where there are none that can be used, a batch of the training clips."""
        if len(self.held_out):
            try:
                return self._read_validator(self.held_out)
            except DataError as error:
                self.console.warn(f"clips of the training stand in for those held out: {error}")
        return self._read_validator(self.manifest)

    def _read_validator(self, clips: Manifest) -> Validator:
        batch = min(len(clips), self.recipe.batch_size)
        recipe = replace(self.recipe, batch_size=batch, train=replace(self.recipe.train, accumulation=1))
        alone = replace(self.world, rank=0, size=1)
        loader, _ = self._new_loader(clips, recipe, alone)
        try:
            steps = zip(range(len(clips) // batch), loader.iterate(0), strict=False)
            audio = [micro for _, step in steps for micro in step]
        finally:
            loader.close()
        if clips is self.held_out:
            self.other_bad += loader.bad.bad()
        names = [clips.path(row) for row in range(len(clips))]
        return Validator(self.step, audio, names, self.recipe.train.pictures)

    def _save(self, saver: checkpoint.AsyncSaver, done: int) -> None:
        bad = self._record()[1]
        if not self.world.first:
            return
        tensors, groups = checkpoint.optimizer_state(self.step.optimizer)
        data: dict[str, Any] = {
            "recipe": self.recipe.name,
            "recipe_config": to_dict(self.recipe),
            "manifest_digest": self.digest,
            "optimizer_groups": groups,
            "loss_scale": self.step.scaler.state_dict() if self.step.scaler else None,
            "bad_clips": bad,
            "skipped_updates": self.step.skipped,
            "plateau": self.step.plateau.state() if self.step.plateau else None,
            "environment": environment(self.world),
        }
        groups_of_tensors = {"model": self.step.model.state_dict(), "optimizer": tensors}
        if self.step.scores is not None:
            groups_of_tensors["scores"] = self.step.scores.tensors()
            data["scores"] = self.step.scores.state()
        saver.save(done, groups_of_tensors, data)

    def _resume(self) -> int:
        """Take up the newest valid checkpoint and return the number of steps it has behind it."""
        root = self.spec.out / "checkpoints"
        if self.world.first:
            checkpoint.clean(root)
        self.world.barrier()
        found = checkpoint.latest(root)
        for reason in found.damaged:
            self.console.warn(f"passed over: {reason}")
        saved = found.checkpoint
        if saved is None:
            if found.damaged:
                raise CheckpointError(
                    f"--resume {self.spec.out}: no valid checkpoint is left. {' '.join(found.damaged)} "
                    "Start a new run."
                )
            self.console.note("No checkpoint was saved yet: the run starts from its beginning.")
            self._first_state()
            return 0
        if saved.data.get("recipe") != self.recipe.name:
            raise CheckpointError(
                f"{saved.path}: was written by the recipe {saved.data.get('recipe')!r}, and this run's is "
                f"{self.recipe.name!r}. Start a new run with --init-from for the weights that fit."
            )
        if saved.step > self.steps:
            raise CheckpointError(f"{saved.path}: is at step {saved.step} of a run of {self.steps} steps.")
        try:
            checkpoint.load_model(self.step.model, saved.tensors["model"])
            checkpoint.load_optimizer(
                self.step.optimizer, saved.tensors["optimizer"], saved.data["optimizer_groups"]
            )
            if self.step.scaler:
                self.step.scaler.load_state_dict(saved.data["loss_scale"])
            self.step.skipped = int(saved.data["skipped_updates"])
            if self.step.plateau:
                self.step.plateau.load_state(saved.data["plateau"])
            if self.step.scores:
                self.step.scores.load(saved.tensors["scores"], saved.data["scores"])
            own = saved.data["bad_clips"][min(self.world.rank, len(saved.data["bad_clips"]) - 1)]
            self.loader.bad.load_state(own)
            changed = differences_at_resume(saved.data["environment"], environment(self.world))
        except (KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{saved.path}: lacks a part of a run's state ({error}).") from error
        for line in changed:
            self.console.warn(f"{line}. The run goes on, but not bit for bit as it would have.")
        optim.check_updates(self.step.optimizer, saved.step, self.step.skipped)
        if self.recipe.input_norm.kind == "per_bin":
            self.bins_line = "mean and deviation of each mel bin, from the checkpoint"
        self.console.note(f"Resumed at step {saved.step} of {self.steps} from {saved.path.name}.")
        return saved.step
