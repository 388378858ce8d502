"""Stopping a command from outside; training finishes its step and saves a checkpoint.

Schedulers announce preemption with SIGTERM, SIGUSR1 or SIGHUP, and people press Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


class Stopped(BaseException):
    """A signal stopped a command; like `KeyboardInterrupt` not for those who handle errors."""


class StopSignals:
    """While entered, signals stop the command in an orderly way: unfinished files are removed.

    Inside `deferred()` the first signal only sets `received`. Everywhere else, and from the second
    signal on, a signal raises `Stopped` (Ctrl-C: `KeyboardInterrupt`) at once. Signals that were
    ignored before (nohup) stay ignored.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._deferred = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the block finish before a signal stops the run."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is None and self._deferred:
            self.received = signal.Signals(number)
            # Not through logging or print, whose locks this thread may be holding.
            os.write(2, b"stopping after this step; send the signal again to stop at once\n")
            return
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Stopped(f"stopped by {signal.Signals(number).name}")


def end_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask Linux for a signal when the parent process ends, even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
