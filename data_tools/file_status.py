"""Size and time of files, to detect changes without reading them."""

from __future__ import annotations

import os
from pathlib import Path


def file_fingerprint(path: Path) -> list[int]:
    """Size in bytes and modification time in ns."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def has_size(path: Path, num_bytes: int) -> bool:
    """Whether `path` is a file of this size."""
    try:
        return path.stat().st_size == num_bytes
    except FileNotFoundError:
        return False
