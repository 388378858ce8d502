"""The process group of a `torchrun` launch; every function also works in a single process."""

import contextlib
import datetime
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


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
def init_process_group() -> Iterator[Process]:
    """Join the process group that torchrun's environment describes, and leave it at the end.

    NCCL connects GPUs, gloo CPUs. Without torchrun's variables there is one process and no group.
    Ranks other than 0 log warnings only.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if rank:
        logging.getLogger("i3d_gn").setLevel(logging.WARNING)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # Ranks wait longer for one another's last test videos than for a gradient.
            timeout=datetime.timedelta(hours=1),
        )
    try:
        yield Process(rank, world_size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


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


def is_equal_on_all_ranks(value: int, process: Process) -> bool:
    """Whether all ranks pass the same number."""
    largest = all_reduce_max(torch.tensor([value, -value], device=process.device))
    return int(largest[0]) == -int(largest[1])


def broadcast_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite `tensors` with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait until every rank arrives here."""
    if dist.is_initialized():
        dist.barrier()
