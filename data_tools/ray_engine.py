"""The counterpart of `processes` for a Ray cluster whose machines share their disks.

A task runs its item in a child process, as on one machine, so a crash of the decoder costs one
item. If Ray itself loses a node or a worker, the item is retried elsewhere.
"""

from __future__ import annotations

import logging
import pickle
import re
import socket
from collections.abc import Callable, Generator, Sequence
from typing import Any

from data_tools.processes import ChildProcess, Outcome

# An item fails after losing its node or worker more often than this.
_MAX_RETRIES = 8
# Tasks submitted ahead of free cores, so that no core waits for this process.
_TASKS_PER_CPU = 2


def map_on_ray(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    address: str,
    timeout_seconds: float,
    memory_bytes: int | None = None,
) -> Generator[tuple[int, Outcome]]:
    """Yield `(i, outcome of function(items[i]))` as they finish, in any order.

    Each item uses one core. Every machine needs this package and must see the files under the same
    paths. Close the generator to stop.

    Args:
        function: As for `map_in_processes`.
        items: Its arguments.
        address: `host:port` of a running cluster, or `auto` on one of its machines.
        timeout_seconds: Time limit per item.
        memory_bytes: Memory limit per item (Linux only).

    Raises:
        ValueError: If Ray is not installed or there is no cluster at `address`.
    """
    try:
        import ray  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
        from ray.exceptions import (  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
            RayError,
            RayTaskError,
        )
    except ImportError:
        raise ValueError(
            "--engine ray needs Ray; run `pip install 'i3d_gn[ray]'` on every machine"
        ) from None
    try:
        _check_address(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"no Ray cluster at {address} ({str(error).splitlines()[0]}); start one with "
            "`ray start --head`, and `ray start --address HOST:PORT` on the other machines"
        ) from error
    try:
        task = ray.remote(num_cpus=1, max_retries=_MAX_RETRIES)(_run_isolated)
        call = ray.put((function, memory_bytes))
        waiting = iter(range(len(items)))
        running: dict[Any, int] = {}
        while True:
            # Each time, since machines may join during the run.
            at_once = max(1, int(_TASKS_PER_CPU * ray.cluster_resources().get("CPU", 1)))
            while len(running) < at_once and (i := next(waiting, None)) is not None:
                running[task.remote(call, items[i], timeout_seconds)] = i
            if not running:
                return
            done, _ = ray.wait(list(running), num_returns=1, timeout=10)
            for reference in done:
                i = running.pop(reference)
                try:
                    yield i, ray.get(reference)
                except RayTaskError as error:  # Raised by the task itself.
                    failure = f"{type(error.cause).__name__}: {error.cause}"
                    yield i, Outcome(failure=failure, kind="error")
                except RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    message = f"Ray lost it {1 + _MAX_RETRIES} times: {reason}"
                    yield i, Outcome(failure=message, kind="lost")
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise `OSError` if nothing listens at `address`; Ray takes five minutes to notice."""
    match = re.fullmatch(r"([^/:]+):(\d+)", address)
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=10).close()


# Ray reuses its worker processes, and each of them its child.
_child: tuple[bytes, ChildProcess] | None = None


def _run_isolated(
    call: tuple[Callable[[Any], Any], int | None], item: Any, timeout_seconds: float
) -> Outcome:
    global _child  # noqa: PLW0603
    function, memory_bytes = call
    identity = pickle.dumps(call)
    if _child is None or _child[0] != identity:
        _child = identity, ChildProcess(function, memory_bytes=memory_bytes)
    return _child[1].call(item, timeout_seconds=timeout_seconds)
