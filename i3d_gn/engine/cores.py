"""How a rank shares its cores between loader workers and computation."""

from typing import Any

from i3d_gn.data import loader
from i3d_gn.engine.distributed import Process


def num_workers(config: Any, process: Process) -> int:
    """Loader workers of this rank: `config.data.num_workers`, or by the cores and the device."""
    if config.data.num_workers is not None:
        return config.data.num_workers
    return loader.default_num_workers(process.device, process.world_size)


def limit_compute_threads(config: Any, process: Process) -> None:
    """On a CPU, compute on the cores that `num_workers` leaves."""
    loader.limit_compute_threads(
        process.device, process.world_size, num_workers=num_workers(config, process)
    )
