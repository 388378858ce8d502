"""Time that the steps of a run take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Time since the last log line, validation excluded."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        """Start anew after this step."""
        self._started, self._step = time.monotonic(), step

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._started

    def seconds_per_step(self, step: int) -> float:
        """On average, up to this step."""
        return self.seconds() / (step - self._step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what happens in the block."""
        pause = time.monotonic()
        yield
        self._started += time.monotonic() - pause


def duration(seconds: float) -> str:
    """`1h05m` or `5m07s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"
