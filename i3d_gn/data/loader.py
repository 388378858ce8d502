"""Loaders that yield items in a fixed order, for any number of worker processes.

A worker that dies or hangs costs the sample that did it, not the run: its batches are loaded again,
one sample per process, and only what fails again is skipped.
"""

import collections
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

from i3d_gn.data.batches import Batch, Sample
from i3d_gn.data.videos import TestVideo, TestVideos

ItemT = TypeVar("ItemT")

_SHARED_MEMORY = Path("/dev/shm")
# How often to look after the workers, and the silence after which a stall is reported.
_POLL_SECONDS = 5.0
_STALL_SECONDS = 60.0

logger = logging.getLogger(__name__)


class Containable(Protocol):
    """A dataset whose items can be skipped if a worker dies or hangs over them."""

    def split(self, key: Any) -> Sequence[Any]:
        """Keys of the smallest items that `key` consists of."""
        ...

    def merge(self, items: Sequence[Any]) -> Any:
        """The item of a key from those of its `split`."""
        ...

    def skipped(self, key: Any, reason: str) -> Any:
        """What stands for an item that cannot be loaded."""
        ...

    def describe(self, key: Any) -> str:
        """The names of the files of `key`."""
        ...

    def num_bytes(self, key: Any) -> int:
        """Roughly the size of an item in memory."""
        ...


class Loader(Generic[ItemT]):
    """Iterates over the items of `keys`, loaded by worker processes (0: in this one).

    Args:
        dataset: Maps a key to an item.
        keys: In the order of the items.
        num_workers: Worker processes.
        device: For which items are pinned in memory if it is a GPU.
        timeout_seconds: Time limit for a worker to load an item.

    Raises:
        ValueError: Shared memory is too small for the workers, or a worker died over an item of a
            dataset that is not `Containable`.
    """

    def __init__(
        self,
        dataset: Dataset[ItemT],
        keys: Iterable[Any],
        *,
        num_workers: int,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.dataset = dataset
        self.sampler = keys
        self.num_workers = num_workers
        self.device = device
        self.timeout_seconds = timeout_seconds

    def __len__(self) -> int:
        """Number of items."""
        return len(self.sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[ItemT]:
        """Load the items."""
        keys = iter(self.sampler)
        if not self.num_workers:
            yield from _data_loader(self.dataset, keys, 0, self.device, 0.0)
            return
        requested: collections.deque[Any] = collections.deque()
        while True:
            workers = _Workers(self, _remember(keys, requested), self.num_workers)
            try:
                for item in workers:
                    requested.popleft()
                    yield item
                return
            except _WorkerLostError as lost:
                reason = str(lost)
            finally:
                workers.kill()
            logger.warning("%s; loading its samples one by one", reason)
            while requested:
                yield self._load_alone(requested.popleft(), reason)

    def _load_alone(self, key: Any, reason: str) -> ItemT:
        """Load an item with one process per smallest part; skip the parts that fail."""
        dataset: Any = self.dataset
        if not hasattr(dataset, "skipped"):
            raise ValueError(f"{reason}; its samples were among {key}")
        items = []
        for part in dataset.split(key):
            workers = _Workers(self, [part], 1)
            try:
                items += list(workers)
            except _WorkerLostError as lost:
                items.append(dataset.skipped(part, str(lost)))
            finally:
                workers.kill()
        return dataset.merge(items)


class _WorkerLostError(Exception):
    """A worker died, or took too long."""


class _Workers(Generic[ItemT]):
    """The worker processes of one pass over some keys."""

    def __init__(self, loader: Loader[ItemT], keys: Iterable[Any], num_workers: int) -> None:
        self._dataset: Any = loader.dataset
        self._limit = loader.timeout_seconds
        self._too_slow = False
        poll = min(_POLL_SECONDS, self._limit / 2)  # a death is noticed before the time limit
        before = set(multiprocessing.active_children())
        # torch's handler would raise wherever the main program happens to be.
        handler = signal.getsignal(signal.SIGCHLD)
        data_loader = _data_loader(
            loader.dataset, self._checked(keys, num_workers), num_workers, loader.device, poll
        )
        self._items = iter(data_loader)
        if getattr(handler, "__module__", None) == signal_handling.__name__:
            handler = signal.SIG_DFL  # of another loader of this program
        with contextlib.suppress(ValueError):  # outside the main thread torch installs none
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        self._processes = set(multiprocessing.active_children()) - before

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        arrived = threading.Event()
        threading.Thread(target=self._watch, args=(arrived,), daemon=True).start()
        try:
            return self._receive()
        finally:
            arrived.set()

    def _receive(self) -> ItemT:
        while True:
            try:
                return next(self._items)
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                if str(error).startswith("Caught"):  # by the dataset, in the worker
                    raise
                raise self._lost() from error  # while it was handing over an item
            except RuntimeError as error:
                if str(error).startswith("DataLoader worker"):
                    raise self._lost() from error
                if not str(error).startswith("DataLoader timed out"):
                    raise

    def _watch(self, arrived: threading.Event) -> None:
        """Report a stall, and end the workers at the time limit; runs in a thread.

        The time limit of torch does not apply while a tensor is handed over: the main process then
        waits for its worker, which may be stopped, until the worker ends.
        """
        stall = min(_STALL_SECONDS, self._limit)
        if not arrived.wait(stall) and stall < self._limit:
            logger.warning("waiting for data for %.0f s: %s", stall, self._next_names())
        if not arrived.wait(self._limit - stall):
            self._too_slow = True
            for process in self._processes:
                process.kill()

    def _lost(self) -> _WorkerLostError:
        if self._too_slow:
            return _WorkerLostError(f"a loader worker took longer than {self._limit:g} s")
        for process in self._processes:
            process.join(timeout=0.1)
        codes = {process.exitcode for process in self._processes} - {None, 0}
        return _WorkerLostError(
            f"a loader worker died ({_cause(codes)}), because a decoder crashed or memory ran out"
        )

    def kill(self) -> None:
        """End the processes, even those that hang or are stopped."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        del self._items

    def _checked(self, keys: Iterable[Any], num_workers: int) -> Iterator[Any]:
        """Pass keys on; check with the first that its items fit into shared memory."""
        self._outstanding: collections.deque[Any] = collections.deque(maxlen=2 * num_workers)
        for i, key in enumerate(keys):
            if i == 0 and hasattr(self._dataset, "num_bytes"):
                _check_shared_memory(self._dataset.num_bytes(key), num_workers)
            self._outstanding.append(key)
            yield key

    def _next_names(self) -> str:
        if not hasattr(self._dataset, "describe"):
            return "next keys unknown"
        return "; ".join(self._dataset.describe(key) for key in tuple(self._outstanding))


def batch_loader(
    dataset: Dataset[Batch],
    batches: Sampler[list[Sample]],
    *,
    num_workers: int,
    device: torch.device,
    timeout_seconds: float = 300.0,
) -> Loader[Batch]:
    """Load micro-batches for training on `device`, in the order of `batches`."""
    return Loader(
        dataset, batches, num_workers=num_workers, device=device, timeout_seconds=timeout_seconds
    )


def video_loader(
    dataset: TestVideos,
    videos: Sequence[int],
    *,
    num_workers: int,
    device: torch.device,
    timeout_seconds: float = 300.0,
) -> Loader[TestVideo]:
    """Load whole test videos for `device`, in the order given."""
    return Loader(
        dataset, videos, num_workers=num_workers, device=device, timeout_seconds=timeout_seconds
    )


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


class TimedIterator(Iterator[ItemT], Generic[ItemT]):
    """Iterates over a loader and measures the seconds spent waiting for the next item."""

    def __init__(self, items: Iterator[ItemT]) -> None:
        self._items = items
        self.seconds_waited = 0.0

    def __next__(self) -> ItemT:
        """The next item."""
        started = time.monotonic()
        try:
            return next(self._items)
        finally:
            self.seconds_waited += time.monotonic() - started


def _cores_per_rank(world_size: int) -> int:
    """Cores this process may use, shared with the other ranks of this machine."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) // ranks_here


def _data_loader(
    dataset: Dataset[Any],
    keys: Iterator[Any],
    num_workers: int,
    device: torch.device,
    timeout_seconds: float,
) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_size=None,  # a key already stands for a whole batch
        sampler=keys,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_reset_signals if num_workers else None,
        timeout=timeout_seconds,
    )


def _remember(keys: Iterator[Any], requested: collections.deque[Any]) -> Iterator[Any]:
    """Pass keys on, and remember those that no item has arrived for yet."""
    for key in keys:
        requested.append(key)
        yield key


def _check_shared_memory(item_bytes: int, num_workers: int) -> None:
    """Workers send items through shared memory; without enough of it they die, or wait forever."""
    if not _SHARED_MEMORY.is_dir():
        return
    status = os.statvfs(_SHARED_MEMORY)
    free, needed = status.f_bavail * status.f_frsize, item_bytes * num_workers
    if free < needed:
        raise ValueError(
            f"{_SHARED_MEMORY} has {free / 1e6:.3g} MB free, and {num_workers} loader workers need "
            f"{needed / 1e6:.3g} MB or more; make it larger (docker run --shm-size=8g), or use "
            "fewer workers (0: load in the main process)"
        )


def _cause(codes: set[int | None]) -> str:
    names = [
        signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
        for code in codes
    ]
    return ", ".join(sorted(names)) or "unknown cause"


def _identity(batch: Any) -> Any:
    """The default collate function would rebuild tuples as lists."""
    return batch


def _reset_signals(_worker: int) -> None:
    """Leave signals, which often reach every process, to the parent: it shuts the workers down.

    A parent that is interrupted while it receives a tensor drops its connection to the worker,
    whose `multiprocessing.resource_sharer` then reports a traceback through `sys.excepthook` (the
    only thing that a worker uses it for). Nobody is waiting anymore, so it is not printed.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _excepthook_without_disconnects


def _excepthook_without_disconnects(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
