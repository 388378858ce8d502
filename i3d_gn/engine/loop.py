"""The training loop, whatever is trained: optimizer, resume, DDP, steps, log, checkpoints.

A `Task` says what is trained and how it is validated; `i3d_gn.video.train` and
`i3d_gn.imagenet.train` have one each.
"""

from __future__ import annotations

import abc
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from i3d_gn.data.batches import Batch
from i3d_gn.data.loader import TimedIterator
from i3d_gn.data.samplers import micro_batches_per_rank
from i3d_gn.engine.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_model_state,
    save_checkpoint,
)
from i3d_gn.engine.command import NonFiniteLossError
from i3d_gn.engine.distributed import Process
from i3d_gn.engine.optim import build_sgd, learning_rate, load_sgd_state, set_lr
from i3d_gn.engine.recipe import Recipe
from i3d_gn.engine.run_dir import claim_run_dir
from i3d_gn.engine.run_log import RunLog
from i3d_gn.engine.trainer import Trainer
from i3d_gn.engine.typed_config import to_dict

logger = logging.getLogger(__name__)


class Metrics(Protocol):
    """Sums over samples, kept on the device."""

    def read_and_reset(self) -> dict[str, float]:
        """Means over all ranks, with the counts `samples` and `broken`."""
        ...

    def state(self) -> list[float]:
        """The sums over all ranks since they were last read."""
        ...

    def load_state(self, state: list[float]) -> None:
        """Continue from `state`."""
        ...


class Task(abc.ABC):
    """What is trained, on which data, and how it is validated."""

    unit: str  # of throughput, for instance "clips"
    process: Process
    micro_batch_size: int  # samples per forward pass of a rank
    max_broken: int = 0  # samples that may fail to decode before training stops

    @property
    @abc.abstractmethod
    def metrics(self) -> Metrics:
        """Sums over the training samples since the last log line."""

    @abc.abstractmethod
    def build_model(self) -> nn.Module:
        """Build the network, randomly initialized, on its device."""

    @abc.abstractmethod
    def load_weights(self, model: nn.Module) -> None:
        """Load the weights that a new run starts from, if any."""

    @abc.abstractmethod
    def load_state(self, saved: dict[str, Any]) -> None:
        """Continue from what `state` returned, the network itself excepted."""

    @abc.abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides network, optimizer and config."""

    @abc.abstractmethod
    def training_batches(self, first_step: int) -> Iterable[Batch]:
        """This rank's micro-batches from `first_step` to the end of the run."""

    @abc.abstractmethod
    def loss(self, network: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a micro-batch, which is added to `metrics`."""

    @abc.abstractmethod
    def summary(self, values: dict[str, float]) -> str:
        """The training metrics `values` for the console."""

    @abc.abstractmethod
    def validate(self, model: nn.Module, step: int, log: RunLog) -> None:
        """Validate the network after `step` steps, and log the result."""


class TrainingLoop:
    """Trains to `recipe.steps`, from the newest checkpoint under `output_dir` if there is one.

    Args:
        task: What is trained.
        recipe: How.
        config: The run's whole config, saved beside the outputs and in every checkpoint.
        seed: Of initialization and dropout.
        output_dir: Where the run writes.

    Raises:
        ConfigError: `output_dir` holds a run with another config.
        ValueError: The global batch does not split evenly.
    """

    def __init__(
        self, task: Task, recipe: Recipe, *, config: Any, seed: int, output_dir: Path
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
        resume_from = claim_run_dir(output_dir, config, self.process)
        torch.manual_seed(seed)
        torch.backends.cudnn.benchmark = True  # shapes never change
        self.model = task.build_model()
        self.optimizer = build_sgd(self.model, recipe)
        saved = None
        if resume_from is None:
            task.load_weights(self.model)
        else:
            saved = load_checkpoint(resume_from)
            load_model_state(self.model, saved["model"], path=resume_from)
            load_sgd_state(self.optimizer, saved["optimizer"])
            task.load_state(saved)
            logger.info("resuming after step %d from %s", saved["step"], resume_from)
        self.first_step = 0 if saved is None else saved["step"]
        self.num_broken = 0 if saved is None else saved["num_broken"]
        if recipe.compile:
            self.model.compile()
        self.trainer = Trainer(
            DistributedDataParallel(self.model) if self.process.world_size > 1 else self.model,
            self.optimizer,
            task.loss,
            micro_batches=micro_batches,
            process=self.process,
            seed=seed,
            clip_grad_norm=recipe.clip_grad_norm,
            loss_scaling=recipe.precision == "fp16",
        )
        if saved is not None:
            self.trainer.load_state(saved["trainer"])
            if self.process.is_main:  # the sums are already those of all ranks
                task.metrics.load_state(saved["trainer"]["metrics"])

    def run(self) -> None:
        """Take the remaining steps.

        Raises:
            NonFiniteLossError: Training diverged; checkpoints saved before that are good.
            ValueError: More than `task.max_broken` samples failed to decode.
        """
        recipe, steps = self.recipe, self.recipe.steps
        with RunLog(
            self.output_dir, last_step=self.first_step, enabled=self.process.is_main
        ) as self.log:
            batches = TimedIterator(iter(self.task.training_batches(self.first_step)))
            clock = _Clock(self.first_step)
            for step in range(self.first_step, steps):
                lr = learning_rate(step, recipe)
                set_lr(self.optimizer, lr)
                for line in self.trainer.step(step, batches):
                    logger.warning("skipped in step %d: %s", step + 1, line)
                done = step + 1
                if done % recipe.log_every == 0 or done == steps:
                    self._write_log(done, lr, clock, batches)
                if done % recipe.validate_every == 0 or done == steps:
                    with clock.paused():
                        self.task.validate(self.model, done, self.log)
                if done % recipe.checkpoint_every == 0 or done == steps:
                    self._save(done)

    def _write_log(
        self, done: int, lr: float, clock: _Clock, batches: TimedIterator[Batch]
    ) -> None:
        self._check_finite()
        values = self.task.metrics.read_and_reset()
        self.num_broken += int(values["broken"])
        seconds = clock.seconds()
        timing = {
            "samples_per_second": values["samples"] / seconds,
            "data_wait_share": batches.seconds_waited / seconds,
        }
        self.log.write("train", done, {**values, "lr": lr}, timing)
        logger.info(
            "step %d/%d  %s  lr %.2g  %.1f %s/s  waiting for data %.0f %%  %s left",
            done, self.recipe.steps, self.task.summary(values), lr,
            timing["samples_per_second"], self.task.unit, 100 * timing["data_wait_share"],
            _duration(clock.seconds_per_step(done) * (self.recipe.steps - done)),
        )  # fmt: skip
        if self.num_broken > self.task.max_broken:
            raise ValueError(
                f"{self.num_broken} {self.task.unit} failed to decode, more than the "
                f"{self.task.max_broken} allowed; see the warnings above"
            )
        batches.seconds_waited = 0.0
        clock.restart(done)

    def _save(self, done: int) -> None:
        self._check_finite(parameters=True)
        trainer = {**self.trainer.state(), "metrics": self.task.metrics.state()}
        self.log.flush()
        if not self.process.is_main:
            return
        contents = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "config": to_dict(self.config),
            "trainer": trainer,
            "num_broken": self.num_broken,
            **self.task.state(),
        }
        keep = self.recipe.keep_checkpoints
        path = save_checkpoint(self.checkpoints, step=done, contents=contents, keep=keep)
        logger.info("saved %s", path)

    def _check_finite(self, *, parameters: bool = False) -> None:
        try:
            self.trainer.check_finite(parameters=parameters)
        except NonFiniteLossError as error:
            last = latest_checkpoint(self.checkpoints)
            good = f"the last good checkpoint is {last}" if last else "no checkpoint was saved yet"
            raise NonFiniteLossError(f"{error}; {good}") from error


class _Clock:
    """Time since the last log line, validation excluded."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._started, self._step = time.monotonic(), step

    def seconds(self) -> float:
        return time.monotonic() - self._started

    def seconds_per_step(self, step: int) -> float:
        return self.seconds() / (step - self._step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        pause = time.monotonic()
        yield
        self._started += time.monotonic() - pause


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
