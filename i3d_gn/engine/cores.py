"""How a rank shares its cores between loader workers and computation."""

import multiprocessing
import os
from typing import Any

import torch

from i3d_gn.engine.distributed import Process


def num_workers(config: Any, process: Process) -> int:
    """Loader workers of this rank: `config.data.num_workers`, or by the cores and the device.

    With a GPU one per core of this rank; on a CPU half the cores, see `limit_compute_threads`. None
    in a daemonic process (of a `multiprocessing.Pool`, say), which may have no children.
    """
    if config.data.num_workers is not None:
        return config.data.num_workers
    if multiprocessing.current_process().daemon:
        return 0
    cores = _cores_per_rank(process.world_size)
    return max(1, cores if process.device.type == "cuda" else cores // 2)


def limit_compute_threads(process: Process, num_workers: int) -> None:
    """On a CPU, leave the loader's workers their cores: torch computes on the remaining ones.

    With more runnable threads than cores, every parallel region waits for its slowest thread. The
    number of threads is only ever lowered, and left alone if OMP_NUM_THREADS is set.
    """
    if process.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        remaining = max(1, _cores_per_rank(process.world_size) - num_workers)
        torch.set_num_threads(min(remaining, torch.get_num_threads()))


def _cores_per_rank(world_size: int) -> int:
    """Cores this process may use, shared with the other ranks of this machine."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return (cores or 1) // ranks_here
