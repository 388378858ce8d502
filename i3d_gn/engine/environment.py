"""What a run runs on: versions, devices, memory."""

import datetime
import importlib.metadata
import os
import platform
import resource
import subprocess
from pathlib import Path
from typing import Any

import torch

import i3d_gn
from i3d_gn.engine.distributed import Process

_PACKAGES = ("torch", "torchvision", "av", "decord", "numpy")


def environment(process: Process) -> dict[str, Any]:
    """Versions and devices of this process, as JSON, for whoever wants to repeat its results."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    on_gpu = process.device.type == "cuda"
    return {
        "i3d_gn": i3d_gn.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **found,
        "cuda": torch.version.cuda if on_gpu else None,
        "device": torch.cuda.get_device_name(process.device) if on_gpu else _cpu(),
        "ranks": process.world_size,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def memory_gib(device: torch.device) -> float:
    """Memory in GiB: on a GPU the peak of its tensors since the last call; else of this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak, which macOS gives in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def _commit() -> str | None:
    """The commit of the source tree that this package is imported from, `+` if it was changed."""
    root = Path(i3d_gn.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+"],
            capture_output=True, text=True, check=True, timeout=10,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _cpu() -> str:
    """Model and number of cores."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    except (OSError, StopIteration, IndexError):
        pass
    return f"{model}, {os.cpu_count()} cores"
