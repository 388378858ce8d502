"""The process group of a `torchrun` launch, or of the one process there is."""

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes what is written once."""
        return self.rank == 0


@contextlib.contextmanager
def join_world() -> Iterator[World]:
    """Join the group that torchrun's environment describes; leave it at the end.

    NCCL carries tensors between GPUs, gloo between CPUs. Without torchrun's variables the world
    has one process and no group is made.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            # Ranks wait for one another's last test videos longer than for a gradient.
            timeout=datetime.timedelta(hours=1),
        )
    try:
        yield World(rank, size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def sum_over_world(values: torch.Tensor) -> torch.Tensor:
    """The element-wise sum of `values` over all processes (in place)."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def same_everywhere(value: int, world: World) -> bool:
    """Whether all processes bring the same number."""
    if not dist.is_initialized():
        return True
    largest = torch.tensor([value, -value], device=world.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest[0]) == -int(largest[1])


def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite `tensors` with those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def wait_for_all() -> None:
    """Return when every process has come here."""
    if dist.is_initialized():
        dist.barrier()
