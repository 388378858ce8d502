"""Loaders that bring micro-batches, in a fixed order for any number of workers."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset, Sampler

from i3d_gn.data.batches import ClipBatch, Sample
from i3d_gn.data.videos import TestVideo, TestVideos

BatchT = TypeVar("BatchT")


def default_num_workers(world_size: int) -> int:
    """The cores this process may use, shared out among the processes of this machine."""
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // processes_here)


def clip_loader(
    dataset: Dataset[ClipBatch],
    batches: Sampler[list[Sample]],
    *,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[ClipBatch]:
    """A loader of micro-batches, in the order of `batches` for any number of workers."""
    return _loader(dataset, batches, num_workers=num_workers, pin_memory=pin_memory)


def video_loader(
    dataset: TestVideos, videos: Sequence[int], *, num_workers: int, pin_memory: bool
) -> DataLoader[TestVideo]:
    """A loader of whole test videos, in the order given."""
    return _loader(dataset, videos, num_workers=num_workers, pin_memory=pin_memory)


class TimedIterator(Iterator[BatchT], Generic[BatchT]):
    """Iterates over a loader and counts the seconds spent waiting for the next batch."""

    def __init__(self, batches: Iterator[BatchT]) -> None:
        self._batches = batches
        self.seconds_waited = 0.0

    def __next__(self) -> BatchT:
        """The next batch."""
        started = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self.seconds_waited += time.monotonic() - started


def _loader(
    dataset: Dataset[Any], keys: Any, *, num_workers: int, pin_memory: bool
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,  # a key already stands for a whole batch
        sampler=keys,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_leave_stopping_to_the_parent if num_workers else None,
    )


def _as_it_is(batch: Any) -> Any:
    """The default would rebuild tuples as lists."""
    return batch


def _leave_stopping_to_the_parent(_worker: int) -> None:
    """Ctrl-C reaches every process; the parent alone should answer and shut the workers down.

    A parent that is interrupted while it takes a tensor over drops its connection to the worker,
    whose `multiprocessing.resource_sharer` then reports a traceback through `sys.excepthook`
    (the one use that a worker has for it). There is nothing to report: nobody waits any more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _report_all_but_a_parent_that_left


def _report_all_but_a_parent_that_left(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
