"""Loaders that yield batches in a fixed order, for any number of worker processes."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from i3d_gn.data.batches import Batch, Sample
from i3d_gn.data.videos import TestVideo, TestVideos

BatchT = TypeVar("BatchT")


def batch_loader(
    dataset: Dataset[Batch],
    batches: Sampler[list[Sample]],
    *,
    num_workers: int,
    device: torch.device,
) -> DataLoader[Batch]:
    """Load micro-batches for training on `device`, in the order of `batches`."""
    return _loader(dataset, batches, num_workers, device)


def video_loader(
    dataset: TestVideos, videos: Sequence[int], *, num_workers: int, device: torch.device
) -> DataLoader[TestVideo]:
    """Load whole test videos for `device`, in the order given."""
    return _loader(dataset, videos, num_workers, device)


def default_num_workers(device: torch.device, world_size: int) -> int:
    """Loader workers per rank: with a GPU one per core of this rank; on a CPU half the cores.

    On a CPU the network computes on the other half, see `limit_compute_threads`.
    """
    cores = _cores_per_rank(world_size)
    return max(1, cores if device.type == "cuda" else cores // 2)


def limit_compute_threads(device: torch.device, world_size: int, *, num_workers: int) -> None:
    """On a CPU, leave the loader's workers their cores: torch computes on the remaining ones.

    With more runnable threads than cores, every parallel region waits for its slowest thread. The
    number of threads is only ever lowered, and left alone if OMP_NUM_THREADS is set.
    """
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        remaining = max(1, _cores_per_rank(world_size) - num_workers)
        torch.set_num_threads(min(remaining, torch.get_num_threads()))


class TimedIterator(Iterator[BatchT], Generic[BatchT]):
    """Iterates over a loader and measures the seconds spent waiting for the next batch."""

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


def _cores_per_rank(world_size: int) -> int:
    """Cores this process may use, shared with the other ranks of this machine."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) // ranks_here


def _loader(
    dataset: Dataset[Any], keys: Any, num_workers: int, device: torch.device
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,  # a key already stands for a whole batch
        sampler=keys,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_interrupts if num_workers else None,
    )


def _identity(batch: Any) -> Any:
    """The default collate function would rebuild tuples as lists."""
    return batch


def _ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C, which reaches every process, to the parent: it shuts the workers down.

    A parent that is interrupted while it receives a tensor drops its connection to the worker,
    whose `multiprocessing.resource_sharer` then reports a traceback through `sys.excepthook` (the
    only thing that a worker uses it for). Nobody is waiting anymore, so it is not printed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _excepthook_without_disconnects


def _excepthook_without_disconnects(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
