"""Find the video files of a folder."""

from __future__ import annotations

import os
from pathlib import Path

VIDEO_EXTENSIONS = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".ts",
        ".webm",
        ".wmv",
    ]
)


def is_video_name(name: str) -> bool:
    """Whether `name` ends in a known video extension, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


def find_videos(root: Path) -> list[str]:
    """Paths of all video files under `root`, relative to it, with `/`, sorted.

    Links to folders are followed, each real folder once. Hidden files and folders are skipped:
    copying programs leave them behind (`._name.mp4`), and unfinished files are hidden.

    Raises:
        ValueError: For a name that is not UTF-8, which neither a list nor an index can hold.
    """
    found: list[str] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in visited:
            subfolders.clear()
            continue
        visited.add(real_folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in names
            if is_video_name(name) and not name.startswith(".")
        ]
    for path in found:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"a file name below {root} is not UTF-8, rename it: {path!a}"
            ) from None
    return sorted(found)
