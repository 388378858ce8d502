"""The steps of a run, whatever it trains on: learning rate, log, validation, checkpoints."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from i3d_gn.data.batches import ClipBatch
from i3d_gn.data.loader import TimedIterator
from i3d_gn.engine.checkpoint import latest_checkpoint, save_checkpoint
from i3d_gn.engine.distributed import World
from i3d_gn.engine.optim import set_lr
from i3d_gn.engine.run_log import RunLog
from i3d_gn.engine.trainer import NonFiniteLossError, Trainer

logger = logging.getLogger(__name__)


def run_steps(
    trainer: Trainer,
    batches: Iterator[ClipBatch],
    *,
    steps: range,
    lr_at: Callable[[int], float],
    validate: Callable[[int], None],
    contents: Callable[[], dict[str, Any]],
    checkpoints: Path,
    world: World,
    log: RunLog | None,
    log_every: int,
    validate_every: int,
    checkpoint_every: int,
    keep_checkpoints: int,
    num_broken: int,
    max_broken: int,
) -> None:
    """Take the optimiser steps of `steps`, all that is left of a run.

    Args:
        trainer: takes one step.
        batches: micro-batches from the first step on.
        steps: numbers of the steps, counted from 0; the last is the run's last.
        lr_at: learning rate of a step.
        validate: called after every `validate_every` steps and the last, with the steps done.
        contents: what a checkpoint needs besides the trainer's state.
        checkpoints: folder.
        world: this process among all.
        log: on the main process.
        log_every: in steps.
        validate_every: in steps.
        checkpoint_every: in steps.
        keep_checkpoints: how many.
        num_broken: samples left out so far.
        max_broken: when to stop.

    Raises:
        NonFiniteLossError: training diverged; the checkpoints written before it are good.
        ValueError: more than `max_broken` samples could not be decoded.
    """
    timed = TimedIterator(batches)
    started, timed_from = time.monotonic(), steps.start
    for step in steps:
        lr = lr_at(step)
        set_lr(trainer.optimizer, lr)
        for line in trainer.step(step, timed):
            logger.warning("left out of step %d: %s", step + 1, line)
        done = step + 1

        if done % log_every == 0 or done == steps.stop:
            _stop_if_diverged(trainer, checkpoints)
            values = trainer.metrics.read_and_reset()
            num_broken += int(values["broken"])
            seconds = time.monotonic() - started
            timing = {
                "clips_per_second": values["clips"] / seconds,
                "data_wait_share": timed.seconds_waited / seconds,
            }
            if log is not None:
                log.write("train", done, {**values, "lr": lr}, timing)
                logger.info(
                    "step %d/%d  loss %.4f  top-1 %.1f %%  lr %.2g  %.1f clips/s  "
                    "waiting for data %.0f %%  %s left",
                    done, steps.stop, values["loss"], values["top1"], lr,
                    timing["clips_per_second"], 100 * timing["data_wait_share"],
                    _duration(seconds / (done - timed_from) * (steps.stop - done)),
                )  # fmt: skip
            if num_broken > max_broken:
                raise ValueError(
                    f"{num_broken} clips could not be decoded, more than "
                    f"data.max_broken_clips {max_broken}; see the warnings above and rebuild the "
                    "index with --decode, which leaves broken videos out"
                )
            timed.seconds_waited = 0.0
            started, timed_from = time.monotonic(), done

        if done % validate_every == 0 or done == steps.stop:
            pause = time.monotonic()
            validate(done)
            started += time.monotonic() - pause

        if done % checkpoint_every == 0 or done == steps.stop:
            _stop_if_diverged(trainer, checkpoints, parameters=True)
            trainer_state = trainer.state()
            if log is not None:
                log.flush()
            if world.is_main:
                path = save_checkpoint(
                    checkpoints,
                    step=done,
                    contents={**contents(), "trainer": trainer_state, "num_broken": num_broken},
                    keep=keep_checkpoints,
                )
                logger.info("saved %s", path)


def _stop_if_diverged(trainer: Trainer, checkpoints: Path, *, parameters: bool = False) -> None:
    try:
        trainer.check_finite(parameters=parameters)
    except NonFiniteLossError as error:
        last = latest_checkpoint(checkpoints)
        raise NonFiniteLossError(
            f"{error}; try a lower train.lr, train.warmup_steps or train.clip_grad_norm. "
            + (f"The last good checkpoint is {last}" if last else "No checkpoint was written yet")
        ) from error


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
