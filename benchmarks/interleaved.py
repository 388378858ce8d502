"""Timing for benchmarks that compare: medians of repeats that go round all candidates."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

# Of a GPU's clock, a good half millisecond: forward and backward of a layer are launched in less.
_CYCLES_TO_LAUNCH = 1_000_000


def median_seconds(
    candidates: dict[str, Callable[[], object]],
    *,
    device: str,
    repeats: int,
    warm_up: int,
    calls: int = 1,
    queued: bool = False,
) -> dict[str, float]:
    """Median duration of a call of each candidate.

    Each repeat runs all of them one after the other, `calls` times in a row each, so that a noisy
    neighbour or a sinking clock hits all alike. On CUDA by events around the calls, elsewhere
    in processor time of all threads, which other processes on the machine do not enter. `queued`
    calls wait on the GPU until all are launched: the time is that of the kernels alone, where
    launching them takes longer.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(warm_up + repeats):
        for name, run in candidates.items():
            if device == "cuda":
                duration = _seconds_cuda(run, calls, queued)
            else:
                duration = _seconds_cpu(run, calls)
            if repeat >= warm_up:
                seconds[name].append(duration / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_launch_seconds(
    candidates: dict[str, Callable[[], object]], *, repeats: int, calls: int
) -> dict[str, float]:
    """Median time that the host takes to launch a call on CUDA, while the GPU does nothing yet."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, run in candidates.items():
            torch.cuda.synchronize()
            torch.cuda._sleep(_CYCLES_TO_LAUNCH * calls)
            started = time.perf_counter()
            for _ in range(calls):
                run()
            seconds[name].append((time.perf_counter() - started) / calls)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in seconds.items()}


def environment(device: str) -> dict[str, str]:
    """Hardware, versions and commit, for the head of a result."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{_cpu_name()}, {torch.get_num_threads()} thread(s)"
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "hardware": hardware,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit or "unknown",
    }


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table; numbers are written as they come."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def _seconds_cuda(run: Callable[[], object], calls: int, queued: bool) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if queued:
        torch.cuda._sleep(_CYCLES_TO_LAUNCH * calls)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _seconds_cpu(run: Callable[[], object], calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        run()
    return time.process_time() - started


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
