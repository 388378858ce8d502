"""Loaders that yield items in a fixed order, for any number of worker processes.

A worker that dies or hangs costs the sample that did it, not the run: its batches are loaded again,
one sample per process, and only what fails again is skipped.
"""

from __future__ import annotations

import collections
import copy
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from i3d_gn.data.batches import Batch, Sample
from i3d_gn.data.videos import TestVideo, TestVideos
from i3d_gn.data.workers import WorkerLostError, Workers, data_loader

ItemT = TypeVar("ItemT")

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
            yield from data_loader(self.dataset, keys, 0, self.device, 0.0)
            return
        requested: collections.deque[Any] = collections.deque()
        while True:
            workers = self._workers(_remember(keys, requested), self.num_workers)
            try:
                for item in workers:
                    requested.popleft()
                    yield item
                return
            except WorkerLostError as lost:
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
            workers = self._workers([part], 1)
            try:
                items += list(workers)
            except WorkerLostError as lost:
                items.append(dataset.skipped(part, str(lost)))
            finally:
                workers.kill()
        return dataset.merge(items)

    def _workers(self, keys: Iterable[Any], num_workers: int) -> Workers[ItemT]:
        return Workers(
            self.dataset,
            keys,
            num_workers=num_workers,
            device=self.device,
            timeout_seconds=self.timeout_seconds,
        )


class VideoPart(Protocol):
    """Some of what is loaded of a video."""

    @property
    def video(self) -> int:
        """Its number."""
        ...

    @property
    def is_last(self) -> bool:
        """Whether no more of it follows."""
        ...


PartT = TypeVar("PartT", bound=VideoPart)


class VideosInParts(ABC, IterableDataset[PartT]):
    """Videos that are loaded in parts, in order, because whole ones may not fit into memory.

    Args:
        wanted: The numbers of the videos; loader workers share them.
    """

    def __init__(self, wanted: Sequence[int]) -> None:
        self.wanted = list(wanted)

    def __iter__(self) -> Iterator[PartT]:
        """All parts of all wanted videos of this worker."""
        worker = get_worker_info()
        for video in self.wanted[worker.id :: worker.num_workers] if worker else self.wanted:
            yield from self.parts(video)

    def only(self, videos: Sequence[int]) -> VideosInParts[PartT]:
        """The same for some of the videos."""
        some = copy.copy(self)
        some.wanted = list(videos)
        return some

    @abstractmethod
    def parts(self, video: int) -> Iterator[PartT]:
        """The parts of a video, at least one; always the same ones."""

    @abstractmethod
    def skipped(self, video: int, reason: str) -> PartT:
        """The last part of a video of which no more can be loaded."""

    @abstractmethod
    def describe(self, video: int) -> str:
        """The name of its file."""

    @abstractmethod
    def num_bytes(self, video: int) -> int:
        """Roughly the size of a part in memory."""


class PartLoader(Generic[PartT]):
    """Iterates over the parts of videos, loaded by worker processes (0: in this one).

    Workers share the videos. If one dies or hangs, the video that each of them was at is loaded in
    a process of its own, and what has arrived of it before is not repeated.

    Args:
        dataset: The videos.
        num_workers: Worker processes.
        device: For which parts are pinned in memory if it is a GPU.
        timeout_seconds: Time limit for a worker to load a part.

    Raises:
        ValueError: Shared memory is too small for the workers.
    """

    def __init__(
        self,
        dataset: VideosInParts[PartT],
        *,
        num_workers: int,
        device: torch.device,
        timeout_seconds: float,
    ) -> None:
        self.dataset = dataset
        self.num_workers = num_workers
        self.device = device
        self.timeout_seconds = timeout_seconds

    def __iter__(self) -> Iterator[PartT]:
        """Load the parts; those of one video are in order."""
        if not self.num_workers:
            yield from self.dataset
            return
        unfinished = list(self.dataset.wanted)
        arrived: collections.Counter[int] = collections.Counter()
        while unfinished:
            num_workers = min(self.num_workers, len(unfinished))
            shares = [unfinished[i::num_workers] for i in range(num_workers)]
            try:
                yield from self._load(unfinished, num_workers, unfinished, arrived)
            except WorkerLostError as lost:
                logger.warning("%s; loading the videos that were being read one by one", lost)
            waiting = [[video for video in share if video in unfinished] for share in shares]
            for video in [videos[0] for videos in waiting if videos]:
                try:
                    yield from self._load([video], 1, unfinished, arrived)
                except WorkerLostError as lost:
                    unfinished.remove(video)
                    yield self.dataset.skipped(video, str(lost))

    def _load(
        self,
        videos: list[int],
        num_workers: int,
        unfinished: list[int],
        arrived: collections.Counter[int],
    ) -> Iterator[PartT]:
        """Parts that have not arrived yet; removes videos from `unfinished`."""
        workers = Workers(
            self.dataset.only(videos),
            videos,
            num_workers=num_workers,
            device=self.device,
            timeout_seconds=self.timeout_seconds,
        )
        repeated = arrived.copy()
        try:
            for part in workers:
                if repeated[part.video]:
                    repeated[part.video] -= 1
                    continue
                arrived[part.video] += 1
                if part.is_last:
                    unfinished.remove(part.video)
                yield part
        finally:
            workers.kill()


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


def _remember(keys: Iterator[Any], requested: collections.deque[Any]) -> Iterator[Any]:
    """Pass keys on, and remember those that no item has arrived for yet."""
    for key in keys:
        requested.append(key)
        yield key
