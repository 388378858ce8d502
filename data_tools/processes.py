"""Apply a function to many items in child processes that may crash or hang.

Video decoders do both on broken files. `concurrent.futures` gives up its whole pool when a child
dies and cannot tell which item killed it. Here each child has one item at a time: a child that dies
or exceeds the time limit costs exactly that item, and is replaced.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, Literal

from i3d_gn.files import NO_SPACE

# Not fork: the fork of a process with decoder threads can deadlock.
_spawn = multiprocessing.get_context("spawn")
_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
# How long a child may take to remove the file that it is writing.
_END_SECONDS = 2.0


FailureKind = Literal["refused", "error", "disk", "crash", "timeout", "memory", "lost"]


@dataclass(frozen=True)
class Outcome:
    """Result of one item: the return value of the function, or why there is none.

    Kinds of failures: the function raised `ItemFailure` (refused) or another exception (error), the
    disk is full or read-only (disk), its process died (crash) or exceeded the limit of time
    (timeout) or memory (memory), or a cluster lost the item (lost).
    """

    value: Any = None
    failure: str | None = None
    kind: FailureKind | None = None


class ItemFailure(Exception):  # noqa: N818 (an expected outcome, not a program error)
    """Raised by a function to report why its item has no result."""


def available_cpus() -> int:
    """Number of cores that this process may use; a batch system may restrict it to some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_in_processes(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    *,
    num_workers: int,
    timeout_seconds: float,
    memory_bytes: int | None = None,
) -> Generator[tuple[int, Outcome]]:
    """Yield `(i, outcome of function(items[i]))` as they finish, in any order.

    `function` is a top-level function of a module, or a `functools.partial` of one. An exception,
    a crash of the process, or exceeding `timeout_seconds` or `memory_bytes` (Linux only) is a
    failure of that item only. Close the generator to stop the children early.
    """
    waiting = deque(range(len(items)))
    workers = [_Worker(function, memory_bytes) for _ in range(min(num_workers, len(items)))]
    try:
        while waiting or any(worker.item is not None for worker in workers):
            for worker in workers:
                if worker.is_idle and waiting:
                    i = waiting.popleft()
                    worker.start_item(i, items[i], deadline=time.monotonic() + timeout_seconds)
            yield from _collect(workers, timeout_seconds=timeout_seconds)
    finally:
        for worker in workers:
            if worker.item is not None:
                worker.terminate()  # at the same time
        for worker in workers:
            worker.stop()


class ChildProcess:
    """One child process for many calls, with the guarantees of `map_in_processes`."""

    def __init__(self, function: Callable[[Any], Any], *, memory_bytes: int | None = None) -> None:
        self._worker = _Worker(function, memory_bytes)

    def call(self, item: Any, *, timeout_seconds: float) -> Outcome:
        """The outcome of `function(item)`; if the child dies, it is replaced."""
        while not self._worker.is_idle:  # Wait for the message that it has started.
            for _ in _collect([self._worker], timeout_seconds=timeout_seconds):
                raise AssertionError("outcome without an item")
        self._worker.start_item(0, item, deadline=time.monotonic() + timeout_seconds)
        while True:
            for _, outcome in _collect([self._worker], timeout_seconds=timeout_seconds):
                return outcome


def _collect(workers: list[_Worker], *, timeout_seconds: float) -> Iterator[tuple[int, Outcome]]:
    """Wait until a child reports, dies or exceeds its deadline; yield (item, outcome)."""
    deadlines = [worker.deadline for worker in workers if worker.item is not None]
    wait_seconds = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
    ready = connection.wait(
        [worker.connection for worker in workers if not worker.is_idle], wait_seconds
    )
    for worker in workers:
        if worker.connection in ready:
            finished, outcome = worker.receive()
        elif worker.item is not None and time.monotonic() >= worker.deadline:
            finished, outcome = (
                worker.item,
                Outcome(failure=f"timed out after {timeout_seconds:g} seconds", kind="timeout"),
            )
            worker.restart()
        else:
            continue
        if finished is not None:
            yield finished, outcome


class _Worker:
    """The parent's side of one child process."""

    def __init__(self, function: Callable[[Any], Any], memory_bytes: int | None) -> None:
        self._function = function
        self._memory_bytes = memory_bytes
        self._start()

    def _start(self) -> None:
        self.connection, child_end = _spawn.Pipe()
        self._process = _spawn.Process(
            target=_serve,
            args=(child_end, self._function, self._memory_bytes),
            daemon=True,
            name="data_tools worker",
        )
        resource_tracker.ensure_running()  # when it starts, it unblocks Ctrl-C
        # Ctrl-C reaches the whole process group, but only the parent handles it. A parent that
        # stops in between would leave the child without its arguments, with a traceback.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        child_end.close()
        self._has_started = False
        self.item: int | None = None
        self.deadline = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no message is due: neither that it has started nor the outcome of an item."""
        return self._has_started and self.item is None

    def start_item(self, i: int, item: Any, *, deadline: float) -> None:
        self.item, self.deadline = i, deadline
        # If the child died while idle, receive() finds out.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(item)

    def receive(self) -> tuple[int | None, Outcome]:
        """The message of the child: (item, outcome), with item None if it has just started."""
        try:
            message = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return self._replace_dead()
        if not self._has_started:
            self._has_started = True
            return None, Outcome()
        item, self.item = self.item, None
        return item, message

    def _replace_dead(self) -> tuple[int | None, Outcome]:
        self._process.join()
        cause = _describe_exit(self._process.exitcode)
        if not self._has_started:
            raise OSError(f"a worker process could not start ({cause}); see its message above")
        item = self.item
        self.restart()
        return item, Outcome(failure=f"its process {cause}", kind="crash")

    def restart(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        if self.item is not None:
            self.terminate()
            self._process.join(timeout=_END_SECONDS)
        self._process.kill()
        self._process.join()
        self.connection.close()

    def terminate(self) -> None:
        """Ask the child to end; it removes the file that it is writing."""
        self._process.terminate()


def _describe_exit(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"was killed by {signal.Signals(-exit_code).name}"
    return f"exited with status {exit_code}"


def _serve(
    connection: Connection, function: Callable[[Any], Any], memory_bytes: int | None
) -> None:
    """Main function of a child: process items until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    # An orphan would keep writing the item that the next run starts again.
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if memory_bytes is not None and sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    try:
        connection.send("started")
        while True:
            item = connection.recv()
            try:
                outcome = Outcome(value=function(item))
            except ItemFailure as error:
                outcome = Outcome(failure=str(error), kind="refused")
            except MemoryError:
                limit = "" if memory_bytes is None else f" than {memory_bytes / 2**30:g} GiB"
                outcome = Outcome(failure=f"needs more memory{limit}", kind="memory")
            except Exception as error:
                is_disk = isinstance(error, OSError) and error.errno in NO_SPACE
                reason = str(error) if is_disk else f"{type(error).__name__}: {error}"
                outcome = Outcome(failure=reason, kind="disk" if is_disk else "error")
            connection.send(outcome)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _end(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the clean-up of the first one goes on
    sys.exit(1)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
