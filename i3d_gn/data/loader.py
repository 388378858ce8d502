"""Which samples form which micro-batch, and the loaders that bring them.

    positions  0 1 2 3 | 4 5 6 7 | 8 ...      endless, shuffled anew each epoch
    step       0                 | 1          global_batch_size = 8
    micro-batch 0      | 1       | 2 ...      clips_per_gpu = 4
    rank       0       | 1       | 0          two processes take turns

The assignment depends on the seed and on the two sizes alone, so that a run can stop at any step
and go on with another number of workers.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from i3d_gn.data.kinetics import ClipBatch, Sample, Stream, TestVideo, TestVideos

BatchT = TypeVar("BatchT")


def micro_batches_per_process(
    *, global_batch_size: int, clips_per_gpu: int, world_size: int
) -> int:
    """Micro-batches that one process accumulates in a step.

    Raises:
        ValueError: the global batch does not divide evenly.
    """
    clips_at_once = clips_per_gpu * world_size
    if global_batch_size % clips_at_once:
        raise ValueError(
            f"a global batch of {global_batch_size} clips cannot be dealt out evenly to "
            f"{world_size} processes of {clips_per_gpu} clips; make train.global_batch_size a "
            f"multiple of {clips_at_once} or use another number of processes"
        )
    return global_batch_size // clips_at_once


class ShuffledMicroBatches(Sampler[list[Sample]]):
    """The micro-batches of one process from `first_step` up to, not including, `last_step`."""

    def __init__(
        self,
        num_videos: int,
        *,
        seed: int,
        global_batch_size: int,
        clips_per_gpu: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
    ) -> None:
        self.num_videos = num_videos
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.clips_per_gpu = clips_per_gpu
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.last_step = last_step
        self.micro_batches = micro_batches_per_process(
            global_batch_size=global_batch_size,
            clips_per_gpu=clips_per_gpu,
            world_size=world_size,
        )

    def __len__(self) -> int:
        """Micro-batches of this process."""
        return (self.last_step - self.first_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[Sample]]:
        """Lists of `clips_per_gpu` samples."""
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.last_step):
            for turn in range(self.micro_batches):
                micro_batch = turn * self.world_size + self.rank
                first = step * self.global_batch_size + micro_batch * self.clips_per_gpu
                samples = []
                for position in range(first, first + self.clips_per_gpu):
                    if position // self.num_videos != epoch:
                        epoch = position // self.num_videos
                        rng = np.random.default_rng((self.seed, Stream.SHUFFLE, epoch))
                        order = rng.permutation(self.num_videos)
                    samples.append(Sample(position, int(order[position % self.num_videos])))
                yield samples


class EachVideoOnce(Sampler[list[Sample]]):
    """One clip of every video, dealt to the processes in turn; the last batches may be smaller."""

    def __init__(self, num_videos: int, *, clips_per_gpu: int, rank: int, world_size: int) -> None:
        self.videos = range(rank, num_videos, world_size)
        self.clips_per_gpu = clips_per_gpu

    def __len__(self) -> int:
        """Micro-batches of this process."""
        return math.ceil(len(self.videos) / self.clips_per_gpu)

    def __iter__(self) -> Iterator[list[Sample]]:
        """Lists of at most `clips_per_gpu` samples."""
        for first in range(0, len(self.videos), self.clips_per_gpu):
            yield [Sample(v, v) for v in self.videos[first : first + self.clips_per_gpu]]


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
