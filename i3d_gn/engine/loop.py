"""The training loop, whatever is trained: optimizer, resume, DDP, steps, log, checkpoints.

A `Task` says what is trained and how it is validated; `i3d_gn.video.train`,
`i3d_gn.imagenet.train` and `i3d_gn.detection.train` have one each.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from i3d_gn.data.batches import AnyBatch
from i3d_gn.data.loader import TimedIterator
from i3d_gn.data.samplers import micro_batches_per_rank
from i3d_gn.engine.activations import ActivationPercentiles
from i3d_gn.engine.average import WeightAverage
from i3d_gn.engine.best import BestValidation
from i3d_gn.engine.checkpoint import (
    BEFORE_VALIDATION,
    BEST,
    CheckpointError,
    delete_before_validation,
    is_before_validation,
    latest_checkpoint,
    load_model_state,
    load_newest,
    save_checkpoint,
    save_named,
)
from i3d_gn.engine.clock import Clock, duration
from i3d_gn.engine.command import NonFiniteLossError
from i3d_gn.engine.cuda_graphs import can_capture, launch_as_graphs
from i3d_gn.engine.distributed import RankError, StopVote, is_about_ranks, names_that_differ
from i3d_gn.engine.environment import environment, memory_gib
from i3d_gn.engine.optim import build_optimizer, learning_rate, load_optimizer_state, set_lr
from i3d_gn.engine.recipe import Recipe
from i3d_gn.engine.run_dir import DirLock, check_same_run, write_run_config
from i3d_gn.engine.run_log import RunLog
from i3d_gn.engine.stop_signals import Stopped, StopSignals
from i3d_gn.engine.task import Task
from i3d_gn.engine.trainer import Trainer
from i3d_gn.engine.typed_config import ConfigError, config_hash, to_dict
from i3d_gn.files import write_json

logger = logging.getLogger(__name__)

# Samples shown as pictures.
_MAX_STRIPS = 8
# Broken samples up to which their share says nothing.
_FEW_BROKEN = 10


class TrainingLoop:
    """Trains to `recipe.steps`, from the newest checkpoint under `output_dir` if there is one.

    Args:
        task: What is trained.
        recipe: How.
        config: The run's whole config, saved beside the outputs and in every checkpoint.
        seed: Of initialization and dropout.
        output_dir: Where the run writes; no other process may use it meanwhile.

    Raises:
        ConfigError: `output_dir` holds a run with another config or other data, is in use, or the
            ranks differ.
        CheckpointError: No checkpoint of the run is intact.
        ValueError: The global batch does not split evenly.
    """

    def __init__(
        self, task: Task[Any], recipe: Recipe, *, config: Any, seed: int, output_dir: Path
    ) -> None:
        self.task = task
        self.recipe = recipe
        self.config = config
        self.process = task.process
        self.output_dir = output_dir
        self.checkpoints = output_dir / "checkpoints"
        micro_batches = micro_batches_per_rank(
            global_batch_size=recipe.global_batch_size,
            micro_batch_size=task.micro_batch_size,
            world_size=self.process.world_size,
        )
        self._lock = DirLock(output_dir) if self.process.is_main else None
        newest = load_newest(self.checkpoints)
        path, saved = newest if newest is not None else (None, None)
        check_same_run(output_dir, config, None if saved is None else saved["config"])
        self.first_step = 0 if saved is None else saved["step"]
        self.num_broken = 0 if saved is None else saved["num_broken"]
        self.num_samples = 0 if saved is None else saved.get("num_samples", 0)
        self._validate_first = path is not None and is_before_validation(path)
        self._check_ranks()
        if saved is not None and path is not None:
            self._check_same_data(saved, path)
        if self.process.is_main:
            write_run_config(output_dir, config)
            write_json(output_dir / "environment.json", environment(self.process))

        torch.manual_seed(seed)
        torch.backends.cudnn.benchmark = task.fixed_shapes
        self.model = task.build_model()
        self.activations = ActivationPercentiles(self.model, recipe.log_activations)
        self.optimizer = build_optimizer(self.model, recipe, task.lr_multiplier)
        self.average = WeightAverage(self.model, recipe.ema_decay) if recipe.ema_decay else None
        self.best = BestValidation(recipe.best_metric, recipe.patience, self.process)
        if saved is None:
            task.load_weights(self.model)
        else:
            assert path is not None
            self._load(saved, path)
            logger.info("resuming after step %d from %s", self.first_step, path)
        if recipe.compile:
            self.model.compile()
        graphs = self._uses_cuda_graphs()
        if graphs:
            launch_as_graphs(self.model)
        self.trainer = Trainer(
            DistributedDataParallel(self.model) if self.process.world_size > 1 else self.model,
            self.optimizer,
            task.loss,
            micro_batches=micro_batches,
            process=self.process,
            seed=seed,
            clip_grad_norm=recipe.clip_grad_norm,
            loss_scaling=recipe.precision == "fp16",
            gradients_are_overwritten=graphs,
        )
        if saved is not None:
            self.trainer.load_state(saved["trainer"])
            if self.process.is_main:  # the sums are already those of all ranks
                task.metrics.load_state(saved["trainer"]["metrics"])

    def run(self) -> None:
        """Take the remaining steps.

        Raises:
            NonFiniteLossError: Training diverged; checkpoints saved before that are good.
            ValueError: Too many samples failed to decode.
            Stopped, KeyboardInterrupt: A signal stopped the run, after a checkpoint if steps were
                being taken.
        """
        with (
            contextlib.ExitStack() as stack,
            StopSignals() as signals,
            RunLog(
                self.output_dir,
                last_step=self.first_step,
                validate_last=self._validate_first,
                config=self.config,
                enabled=self.process.is_main,
            ) as self.log,
        ):
            if self._lock is not None:
                stack.callback(self._lock.close)
            try:
                self._run(signals)
            except (NonFiniteLossError, Stopped):
                raise
            except RuntimeError as error:
                raise self._explained(error) from error

    def _run(self, signals: StopSignals) -> None:
        recipe, steps = self.recipe, self.recipe.steps
        batches = iter(self.task.training_batches(self.first_step))
        if not self.first_step and self.process.is_main:
            batches = self._show_first(batches)
        batches = TimedIterator(batches)
        self._vote = StopVote(self.process, timeout_minutes=recipe.rank_timeout_minutes)
        if self._validate_first:
            self._validate_and_save(self.first_step, signals)
        clock = Clock(self.first_step)
        for step in range(self.first_step, steps):
            if self.best.stops:
                break
            done = step + 1
            logs = done % recipe.log_every == 0 or done == steps
            with signals.deferred():
                lr = learning_rate(step, recipe)
                set_lr(self.optimizer, lr)
                self.trainer.measure_gradient = logs
                with self.activations.measured(logs):
                    broken = self.trainer.step(step, batches)
                if self.average is not None:
                    self.average.update(self.model)
                for line in broken:
                    logger.warning("skipped in step %d: %s", done, line)
                if logs:
                    self._write_log(done, lr, clock, batches)
                validates = done % recipe.validate_every == 0 or done == steps
                stop = self._vote(signals.received is not None)
                if validates:  # do not start what takes minutes before the vote is counted
                    stop = self._vote.result() or stop
                if stop and (validates or done != steps):
                    self._save(done, name=BEFORE_VALIDATION if validates else None)
                    self._raise_stopped(done, signals)
            if validates:
                with signals.deferred():
                    self._save(done, name=BEFORE_VALIDATION)
                if signals.received is not None and self.process.world_size == 1:
                    self._raise_stopped(done, signals)
                with clock.paused():
                    self._validate_and_save(done, signals)
            else:
                self._save_if_due(done, signals)

    def _show_first(self, batches: Iterator[AnyBatch]) -> Iterator[AnyBatch]:
        """Pass batches on, and log their first samples as pictures."""
        for _, batch in zip(range(_MAX_STRIPS), batches, strict=False):
            room = _MAX_STRIPS - self.log.num_strips
            for strip in self.task.strips(batch)[:room] if room else ():
                self.log.write_strip(strip)
            yield batch
        yield from batches

    def _validate_and_save(self, done: int, signals: StopSignals) -> None:
        """Validate; a run that stops meanwhile resumes here, from the checkpoint made for that."""
        self.task.validate(self.tested_model, done, self.log)
        if self.best.update(self.log.last, done):
            with signals.deferred():
                self._save(done, name=BEST)
        if self.best.stops:
            logger.info("%s is best after step %d: stopped", self.best.metric, self.best.step)
        self._save_if_due(done, signals)
        self.log.flush()
        if self.process.is_main:
            delete_before_validation(self.checkpoints)

    def _save_if_due(self, done: int, signals: StopSignals) -> None:
        due = done % self.recipe.checkpoint_every == 0 or done == self.recipe.steps
        if due or self.best.stops:
            with signals.deferred():
                self._save(done)

    def _raise_stopped(self, done: int, signals: StopSignals) -> None:
        number = signals.received
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        name = number.name if number is not None else "a signal to another rank"
        raise Stopped(f"stopped by {name} after step {done}, with a checkpoint")

    def _uses_cuda_graphs(self) -> bool:
        recipe = self.recipe
        return (
            recipe.cuda_graphs
            and not recipe.compile
            and not recipe.log_activations  # a graph calls no hooks
            and self.task.fixed_shapes
            and can_capture(self.model)
        )

    def _check_ranks(self) -> None:
        values = {
            "newest checkpoint": f"{self.first_step} {self._validate_first}",
            "config": config_hash(self.config),
            "torch version": torch.__version__,
            **self.task.data(),
        }
        differing = names_that_differ(values, self.process)
        if "newest checkpoint" in differing:
            raise ConfigError(
                f"the ranks do not find the same newest checkpoint under {self.output_dir}; put "
                "output_dir on storage that all of them share"
            )
        if differing:
            raise ConfigError(
                f"the ranks have a different {' and '.join(differing)}; start the same command in "
                "the same environment on all of them"
            )

    def _check_same_data(self, saved: dict[str, Any], path: Path) -> None:
        before, now = saved.get("data", {}), self.task.data()
        changed = [f"{k}: {before[k]} -> {v}" for k, v in now.items() if before.get(k, v) != v]
        if changed:
            raise ConfigError(
                f"the data have changed since {path} was saved ({'; '.join(changed)}); restore "
                "the data that the run started with, or use another output_dir"
            )

    def _load(self, saved: dict[str, Any], path: Path) -> None:
        self.task.load_state(saved)
        if self.average is None:
            load_model_state(self.model, saved["model"], path=path)
        else:
            load_model_state(self.model, saved["average"]["model"], path=path)
            self.average.load(saved, path)
        self.best.load_state(saved.get("best", self.best.state()))
        try:
            load_optimizer_state(self.optimizer, saved["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{path}: its optimizer state does not fit ({error})") from error

    def _write_log(
        self, done: int, lr: float, clock: Clock, batches: TimedIterator[AnyBatch]
    ) -> None:
        self._check_finite()
        values = self.task.metrics.read_and_reset()
        self.num_broken += int(values["broken"])
        self.num_samples += int(values["samples"]) + int(values["broken"])
        self._check_broken(int(values["samples"]))  # before a loss of no sample is logged
        seconds = clock.seconds()
        timing = {
            "samples_per_second": values["samples"] / seconds,
            "data_wait_share": batches.seconds_waited / seconds,
            "memory_gib": memory_gib(self.process.device),
        }
        self.log.write("train", done, {**values, "lr": lr, **self._measured()}, timing)
        logger.info(
            "step %d/%d  %s  lr %.2g  %.1f %s/s  waiting for data %.0f %%  %s left",
            done, self.recipe.steps, self.task.summary(values), lr,
            timing["samples_per_second"], self.task.unit, 100 * timing["data_wait_share"],
            duration(clock.seconds_per_step(done) * (self.recipe.steps - done)),
        )  # fmt: skip
        batches.seconds_waited = 0.0
        clock.restart(done)

    def _measured(self) -> dict[str, Any]:
        """Norm of the last gradient (None if fp16 skipped its step), percentiles of activations."""
        assert self.trainer.gradient_norm is not None
        norm = float(self.trainer.gradient_norm)
        activations = self.activations.read()
        return {
            "grad_norm": norm if math.isfinite(norm) else None,
            **({"activations": activations} if activations else {}),
        }

    def _check_broken(self, num_since_last_line: int) -> None:
        unit, task = self.task.unit, self.task
        if not num_since_last_line:
            raise ValueError(
                f"no {unit} could be decoded since the last log line; see the warnings"
            )
        share = self.num_broken / self.num_samples
        if self.num_broken > task.max_broken or (
            self.num_broken > _FEW_BROKEN and share > task.max_broken_share
        ):
            raise ValueError(
                f"{self.num_broken} of {self.num_samples} {unit} failed to decode, more than the "
                f"{task.max_broken} or {100 * task.max_broken_share:g} % allowed; see the warnings"
            )

    @property
    def tested_model(self) -> nn.Module:
        """The network to validate and test: the average of the weights if there is one."""
        return self.model if self.average is None else self.average.model

    def _save(self, done: int, *, name: str | None = None) -> None:
        self._check_finite(everything=True)
        trainer = {**self.trainer.state(), "metrics": self.task.metrics.state()}
        self.log.flush()
        if not self.process.is_main:
            return
        contents = {
            "model": self.tested_model.state_dict(),
            **({} if self.average is None else {"average": self.average.state(self.model)}),
            "best": self.best.state(),
            "optimizer": self.optimizer.state_dict(),
            "config": to_dict(self.config),
            "trainer": trainer,
            "num_broken": self.num_broken,
            "num_samples": self.num_samples,
            "data": self.task.data(),
            **self.task.state(),
        }
        if name is not None:
            save_named(self.checkpoints, name, step=done, contents=contents)
            return
        keep = self.recipe.keep_checkpoints
        path = save_checkpoint(self.checkpoints, step=done, contents=contents, keep=keep)
        logger.info("saved %s", path)

    def _check_finite(self, *, everything: bool = False) -> None:
        try:
            self.trainer.check_finite(everything=everything)
        except NonFiniteLossError as error:
            last = latest_checkpoint(self.checkpoints)
            good = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
            raise NonFiniteLossError(f"{error}; {good}") from error

    def _explained(self, error: RuntimeError) -> Exception:
        """Name the rank that was lost, if that is what a collective operation complains about."""
        if self.process.world_size > 1 and is_about_ranks(error):
            return RankError(f"lost contact with {self._vote.name_lost_rank()}")
        return error
