# SPDX-License-Identifier: Apache-2.0
"""The loop: data, model and optimiser put together, steps, checkpoints, and the end of the run.

What a run computes is decided by its RunSpec and its clips; a resumed run takes up the state of its newest valid
checkpoint and computes the same from there on.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from masktrain.data.loader import Loader, make_loader
from masktrain.data.manifest import Manifest
from masktrain.data.order import check_shards
from masktrain.errors import CheckpointError, ConfigError
from masktrain.models import registry
from masktrain.training import checkpoint, corpus, distributed, optim, precision, schedule
from masktrain.training.console import Console
from masktrain.training.recipe import Recipe
from masktrain.training.report import Report
from masktrain.training.run_spec import RunSpec, stored_manifest_digest
from masktrain.training.start_block import differences_at_resume, environment, start_block
from masktrain.training.step import Step
from masktrain.training.stop import StopRequest
from masktrain.training.validation import Validator

CALIBRATION_STEPS = 6


def train(spec: RunSpec, summary_json: Path | None = None) -> None:
    """Run a recipe to its end, or until it is asked to stop. Raises MasktrainError for what the user can act on."""
    world = distributed.join(spec.device)
    try:
        with StopRequest() as stop:
            Trainer(spec, world).fit(stop, summary_json)
    finally:
        distributed.leave()


class Trainer:
    """One run on one rank of the world."""

    def __init__(self, spec: RunSpec, world: distributed.World) -> None:
        check_shards(spec.recipe.batch_size, world.size, spec.recipe.train.accumulation)
        self.world = world
        self.console = Console(enabled=world.first)
        self.precision = precision.choose(spec.recipe.train.precision, world.device)
        manifest = corpus.read_corpus(spec.data, world, self.console)
        self.digest = manifest.digest
        if spec.resume and stored_manifest_digest(spec.out) != self.digest:
            raise ConfigError(
                f"--resume {spec.out}: the clips are not those the run was started with (a path, length or the "
                "order changed). Restore the data, or start a new run with --init-from for its weights."
            )
        self.manifest, self.held_out = corpus.split(manifest, spec.recipe)
        self.spec = self._calibrated(spec) if spec.minutes is not None else spec
        self.recipe = self.spec.recipe
        self.steps = self.recipe.train.steps or self.recipe.schedule.total_steps
        self.schedule = schedule.resolve(
            self.recipe.schedule, self.steps, self.recipe.optim.peak_lr(self.recipe.batch_size)
        )
        self.step = self._new_step(self.recipe, self.schedule)
        if self.spec.init_from and not spec.resume:
            self._init_from(self.spec.init_from)
        self.loader, self.loader_reason = self._new_loader(self.manifest, self.recipe, self.world)

    def _new_step(self, recipe: Recipe, resolved: schedule.ResolvedSchedule) -> Step:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
        model.to(self.world.device)
        return Step(
            recipe, model, optim.build(model, recipe.optim, resolved.lr), resolved, self.world, self.precision
        )

    def _new_loader(
        self, manifest: Manifest, recipe: Recipe, world: distributed.World
    ) -> tuple[Loader, str]:
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

    def _init_from(self, path: Path) -> None:
        """Load the weights of a run folder's newest checkpoint, or of one checkpoint folder."""
        folder = path
        if (path / "checkpoints").is_dir():
            found = checkpoint.latest(path / "checkpoints")
            if found.path is None:
                raise CheckpointError(f"--init-from {path}: holds no valid checkpoint. {' '.join(found.damaged)}")
            folder = found.path
        elif not path.is_dir():
            raise CheckpointError(f"--init-from {path}: no such folder; name a run or one of its checkpoints.")
        checkpoint.load_model(self.step.model, checkpoint.load(folder).tensors.get("model", {}))

    def fit(self, stop: StopRequest, summary_json: Path | None) -> None:
        """Train to the end, save, and write pictures and summary."""
        try:
            with Report(self.spec, self.world, self.console, self.digest, self.steps) as report:
                start = self._resume() if self.spec.resume else 0
                report.begin(start_block(self), start)
                saver = checkpoint.AsyncSaver(self.spec.out / "checkpoints", self.recipe.train.keep_last)
                with saver:
                    done = self._steps(report, saver, stop, start)
                notes = {text: count for text, (count, _) in self.loader.bad.notes().items()}
                report.finish(done, len(self.loader.bad), notes | self.loader.passed_on(), summary_json)
        finally:
            self.loader.close()

    def _steps(self, report: Report, saver: checkpoint.AsyncSaver, stop: StopRequest, start: int) -> int:
        """Do the steps that are left and return how many are done."""
        validator = self._validator()
        every = self.recipe.train.checkpoint_every or max(1, self.steps // 10)
        middle = (self.steps + 1) // 2
        if start == 0:
            report.draw_mask_rate(max(validator.spectrograms[0].lengths))
            report.validated(*validator(0))
        if start == self.steps:
            return start
        done = start
        for audio in self.loader.iterate(start):
            result = self.step(done, audio, stop=stop.requested, baseline=2 <= done + 1 <= 6)
            done += 1
            last = done == self.steps or result.stop
            report.stepped(done, result, self.loader, last)
            if done in (middle, self.steps):
                report.validated(*validator(done))
            if done % every == 0 or last:
                self._save(saver, done)
            saver.check()
            if last:
                break
        return done

    def _validator(self) -> Validator:
        """Read the held-out clips once; where none are held out, a batch of the training clips."""
        clips = self.held_out if len(self.held_out) else self.manifest
        batch = min(len(clips), self.recipe.batch_size)
        recipe = replace(
            self.recipe, batch_size=batch, train=replace(self.recipe.train, accumulation=1)
        )
        alone = replace(self.world, rank=0, size=1)
        loader, _ = self._new_loader(clips, recipe, alone)
        try:
            steps = zip(range(len(clips) // batch), loader.iterate(0), strict=False)
            audio = [micro for _, step in steps for micro in step]
        finally:
            loader.close()
        names = [clips.path(row) for row in range(len(clips))]
        return Validator(self.step, audio, names, self.recipe.train.pictures)

    def _save(self, saver: checkpoint.AsyncSaver, done: int) -> None:
        bad = self.world.gather_objects(self.loader.bad.state())
        if not self.world.first:
            return
        tensors, groups = checkpoint.optimizer_state(self.step.optimizer)
        data: dict[str, Any] = {
            "recipe": self.recipe.name,
            "manifest_digest": self.digest,
            "optimizer_groups": groups,
            "loss_scale": self.step.scaler.state_dict() if self.step.scaler else None,
            "bad_clips": bad,
            "skipped_updates": self.step.skipped,
            "environment": environment(self.world),
        }
        saver.save(done, {"model": self.step.model.state_dict(), "optimizer": tensors}, data)

    def _resume(self) -> int:
        """Take up the newest valid checkpoint and return the number of steps it has behind it."""
        root = self.spec.out / "checkpoints"
        if self.world.first:
            checkpoint.clean(root)
        self.world.barrier()
        found = checkpoint.latest(root)
        for reason in found.damaged:
            self.console.warn(f"passed over: {reason}")
        if found.path is None:
            if found.damaged:
                raise CheckpointError(
                    f"--resume {self.spec.out}: no valid checkpoint is left. {' '.join(found.damaged)} "
                    "Start a new run."
                )
            self.console.note("No checkpoint was saved yet: the run starts from its beginning.")
            return 0
        saved = checkpoint.load(found.path)
        if saved.data.get("recipe") != self.recipe.name:
            raise CheckpointError(
                f"{found.path}: was written by the recipe {saved.data.get('recipe')!r}, and this run's is "
                f"{self.recipe.name!r}. Start a new run with --init-from for the weights that fit."
            )
        if saved.step > self.steps:
            raise CheckpointError(f"{found.path}: is at step {saved.step} of a run of {self.steps} steps.")
        try:
            checkpoint.load_model(self.step.model, saved.tensors["model"])
            checkpoint.load_optimizer(
                self.step.optimizer, saved.tensors["optimizer"], saved.data["optimizer_groups"]
            )
            if self.step.scaler:
                self.step.scaler.load_state_dict(saved.data["loss_scale"])
            self.step.skipped = int(saved.data["skipped_updates"])
            own = saved.data["bad_clips"][min(self.world.rank, len(saved.data["bad_clips"]) - 1)]
            self.loader.bad.load_state(own)
            changed = differences_at_resume(saved.data["environment"], environment(self.world))
        except (KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"{found.path}: lacks a part of a run's state ({error}).") from error
        for line in changed:
            self.console.warn(f"{line}. The run goes on, but not bit for bit as it would have.")
        optim.check_updates(self.step.optimizer, saved.step, self.step.skipped)
        self.console.note(f"Resumed at step {saved.step} of {self.steps} from {found.path.name}.")
        return saved.step

