"""The worker processes of one pass over some items, and how they are lost."""

import collections
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.util import get_temp_dir
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils import signal_handling

ItemT = TypeVar("ItemT")

_SHARED_MEMORY = Path("/dev/shm")
# How often to look after the workers, and the silence after which a stall is reported.
_POLL_SECONDS = 5.0
_STALL_SECONDS = 60.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

logger = logging.getLogger(__name__)


class WorkerLostError(Exception):
    """A worker died, or took too long."""


class Workers(Generic[ItemT]):
    """Iterates over what `num_workers` processes load of a dataset, in the order of `keys`.

    Args:
        dataset: Maps a key to an item, or is iterable.
        keys: In the order of the items. Of an iterable dataset, what it has still to load; whoever
            iterates may remove what has arrived.
        num_workers: At least 1.
        device: For which items are pinned in memory if it is a GPU.
        timeout_seconds: Time limit for an item.

    Raises:
        ValueError: Shared memory is too small for the workers.
        WorkerLostError: A worker died or hangs. The others must be ended by `kill`.
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
        self._dataset: Any = dataset
        self._limit = timeout_seconds
        self._too_slow = False
        poll = min(_POLL_SECONDS, self._limit / 2)  # a death is noticed before the time limit
        get_temp_dir()  # else workers make their own, which stay behind when they are killed
        before = set(multiprocessing.active_children())
        # torch's handler would raise wherever the main program happens to be.
        handler = signal.getsignal(signal.SIGCHLD)
        self._num_workers = num_workers
        if isinstance(dataset, IterableDataset):
            self._outstanding: Iterable[Any] = keys
            self._check_shared_memory(next(iter(keys)))
            keys = iter(())
        else:
            keys = self._checked(keys)
        with _signals_blocked():
            self._items = iter(data_loader(dataset, keys, num_workers, device, poll))
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
            except ValueError as error:
                raise _without_traceback(error) from error
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

    def _lost(self) -> WorkerLostError:
        if self._too_slow:
            return WorkerLostError(f"a loader worker took longer than {self._limit:g} s")
        for process in self._processes:
            process.join(timeout=0.1)
        codes = {process.exitcode for process in self._processes} - {None, 0}
        return WorkerLostError(
            f"a loader worker died ({_cause(codes)}), because a decoder crashed or memory ran out"
        )

    def kill(self) -> None:
        """End the processes, even those that hang or are stopped."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        del self._items

    def _checked(self, keys: Iterable[Any]) -> Iterator[Any]:
        """Pass keys on; check with the first that its items fit into shared memory."""
        outstanding = collections.deque[Any](maxlen=2 * self._num_workers)
        self._outstanding = outstanding
        for i, key in enumerate(keys):
            if i == 0:
                self._check_shared_memory(key)
            outstanding.append(key)
            yield key

    def _check_shared_memory(self, key: Any) -> None:
        if hasattr(self._dataset, "num_bytes"):
            _check_shared_memory(self._dataset.num_bytes(key), self._num_workers)

    def _next_names(self) -> str:
        if not hasattr(self._dataset, "describe"):
            return "next keys unknown"
        keys = tuple(self._outstanding)[: 2 * self._num_workers]
        return "; ".join(self._dataset.describe(key) for key in keys)


def data_loader(
    dataset: Dataset[Any],
    keys: Iterator[Any],
    num_workers: int,
    device: torch.device,
    timeout_seconds: float,
) -> DataLoader[Any]:
    """Torch's loader of items that are whole batches, which leaves signals to this process."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=None if isinstance(dataset, IterableDataset) else keys,
        collate_fn=_identity,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_reset_signals if num_workers else None,
        timeout=timeout_seconds,
    )


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes that start inside the block have the handlers of this one until `_reset_signals`.

    They would be raised as exceptions, with a traceback.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


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
            "fewer workers (data.num_workers=0: load in the main process)"
        )


def _without_traceback(error: ValueError) -> ValueError:
    """An error of the dataset, which torch gives the worker's traceback as its message."""
    kind = type(error).__name__
    _, caught, message = str(error).rpartition(f"{kind}: ")
    return ValueError(message.strip()) if caught and str(error).startswith("Caught") else error


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
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    sys.excepthook = _excepthook_without_disconnects


def _excepthook_without_disconnects(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, traceback)
