"""The process group of a `torchrun` launch; every function also works in a single process."""

import contextlib
import datetime
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from i3d_gn.engine.stop_signals import end_with_parent

# In messages of gloo, most of which name a file of its own.
_LOST = ("gloo", "pair closure", "onnection closed by peer", "onnection reset by peer")


T = TypeVar("T")


class RankError(OSError):
    """Another rank has stopped, or cannot be reached."""


@dataclass(frozen=True)
class Process:
    """This process: `rank` of `world_size`, computing on `device`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes everything that is written once."""
        return self.rank == 0


@contextlib.contextmanager
def init_process_group(*, timeout_minutes: float) -> Iterator[Process]:
    """Join the process group that torchrun's environment describes, and leave it at the end.

    NCCL connects GPUs, gloo CPUs. Without torchrun's variables there is one process and no group.
    Ranks other than 0 log warnings only, and end when torchrun does.

    Args:
        timeout_minutes: How long ranks wait for one another before they give up.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if rank:
        logging.getLogger("i3d_gn").setLevel(logging.WARNING)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()  # a killed torchrun must not leave ranks training
    if world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
    try:
        yield Process(rank, world_size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class StopVote:
    """Agreement of all ranks to stop after the same step, without waiting for the device.

    A vote is counted while the next step runs: its result arrives one call later, on all ranks. It
    is also how a rank that has stopped or lost its connection is noticed, and named.

    Args:
        process: This rank.
        timeout_minutes: How long to wait for the votes of the others.
    """

    def __init__(self, process: Process, *, timeout_minutes: float) -> None:
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        self._group: dist.ProcessGroup | None = None
        if process.world_size > 1:
            timeout = datetime.timedelta(minutes=timeout_minutes)
            group = dist.new_group(backend="gloo", timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            self._group = group

    def __call__(self, stop: bool) -> bool:
        """Vote, and return the result of the previous vote (of this one in a single process).

        Raises:
            RankError: A rank did not vote in time.
        """
        if self._group is None:
            return stop
        result = self.result()
        flag = torch.tensor([int(stop)])
        work = dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._pending = flag, work
        return result

    def result(self) -> bool:
        """Wait for the pending vote; False if there is none."""
        if self._pending is None:
            return False
        (flag, work), self._pending = self._pending, None
        try:
            work.wait()
        except RuntimeError as error:
            raise RankError(f"lost contact with {self.name_lost_rank()}") from error
        return bool(flag)

    def name_lost_rank(self) -> str:
        """Which rank does not answer, found out within seconds."""
        try:
            dist.monitored_barrier(self._group, timeout=datetime.timedelta(seconds=15))
        except RuntimeError as error:
            lost = sorted({int(n) for n in re.findall(r"[Rr]ank (\d+) failed", str(error))})
            if lost:
                return f"rank {', '.join(map(str, lost))}"
            # Only rank 0 knows who is missing; the others miss rank 0. Two ranks have no choice.
            if dist.get_world_size() == 2:
                return f"rank {1 - dist.get_rank()}"
            return "rank 0" if dist.get_rank() else "another rank"
        return "another rank for a while"


def is_about_ranks(error: RuntimeError) -> bool:
    """Whether a collective operation failed because another rank is gone or does not answer."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum `values` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Maximum of `values` over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def names_that_differ(values: Mapping[str, str], process: Process) -> list[str]:
    """The names whose values are not the same on all ranks; every rank passes the same names."""
    hashes = [
        int.from_bytes(hashlib.sha256(value.encode()).digest()[:7], "big")
        for value in values.values()
    ]
    mine = torch.tensor(hashes, dtype=torch.int64, device=process.device)
    largest, smallest = all_reduce_max(mine.clone()), -all_reduce_max(-mine)
    return [name for name, differs in zip(values, largest != smallest, strict=True) if differs]


def broadcast_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite `tensors` with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_on_main(value: T, process: Process) -> list[T]:
    """The values of all ranks by rank, on rank 0; elsewhere nothing. They are pickled."""
    if process.world_size == 1:
        return [value]
    gathered = [value] * process.world_size if process.is_main else []
    dist.gather_object(value, gathered if process.is_main else None, dst=0)
    return gathered


def barrier() -> None:
    """Wait until every rank arrives here."""
    if dist.is_initialized():
        dist.barrier()
