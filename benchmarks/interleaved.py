"""Timing for benchmarks that compare candidates: medians of interleaved repeats."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import cpu_name

# GPU clock cycles: more than half a millisecond, in which a layer's forward and backward launch.
_CYCLES_TO_LAUNCH = 1_000_000


def median_seconds(
    candidates: dict[str, Callable[[], object]],
    *,
    device: str,
    repeats: int,
    warm_up: int,
    calls: int = 1,
    as_graphs: bool = False,
) -> dict[str, float]:
    """Median time of a call of each candidate.

    Each repeat runs all candidates in turn, each `calls` times in a row, so that other load and
    clock changes affect all alike. Time is measured by events on CUDA, and elsewhere as CPU time of
    all threads of this process, which other processes hardly affect.

    Args:
        candidates: functions to time, by name.
        device: `cuda` or `cpu`.
        repeats: measured rounds over all candidates.
        warm_up: rounds before these, not measured.
        calls: calls per candidate and round; the time is their mean.
        as_graphs: on CUDA, launch the calls of a round as one CUDA graph, so that the time is that
            of the kernels even if launching them one by one takes longer.
    """
    if as_graphs and device == "cuda":
        candidates = {name: _as_graph(run, calls) for name, run in candidates.items()}
        graph_calls, calls = calls, 1
    else:
        graph_calls = 1
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(warm_up + repeats):
        for name, run in candidates.items():
            duration = (_seconds_cuda if device == "cuda" else _seconds_cpu)(run, calls)
            if repeat >= warm_up:
                seconds[name].append(duration / calls / graph_calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_launch_seconds(
    candidates: dict[str, Callable[[], object]], *, repeats: int, calls: int
) -> dict[str, float]:
    """Median host time to launch a call on CUDA, with the GPU still waiting."""
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
    """Hardware, versions and commit, for the heading of a result."""
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f"{cpu_name()}, {torch.get_num_threads()} thread(s)"
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


def _as_graph(run: Callable[[], object], calls: int) -> Callable[[], object]:
    """A function that runs `calls` calls by one launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and allocates what is allocated once
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def _seconds_cuda(run: Callable[[], object], calls: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
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
