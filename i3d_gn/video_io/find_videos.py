"""Find the video files of a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

VIDEO_EXTENSIONS = frozenset(
    [
        ".3gp",
        ".asf",
        ".avi",
        ".dv",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
    ]
)


class FoundFiles(NamedTuple):
    """Paths relative to a folder, with `/`, sorted: videos, and files with other extensions."""

    videos: list[str]
    others: list[str]


def is_video_name(name: str) -> bool:
    """Whether `name` ends in a known video extension, in upper or lower case."""
    return os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


def check_name(path: str, where: str = "") -> None:
    """Raise ValueError if the name of a file is not UTF-8: no list, index or table can hold it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        place = f" {where}" if where else ""
        raise ValueError(f"a file name{place} is not UTF-8, rename it: {path!a}") from None


def find_files(root: Path) -> FoundFiles:
    """Find all files under `root`.

    Links to folders are followed, each real folder once. Hidden files and folders are skipped:
    copying programs leave them behind (`._name.mp4`), and unfinished files are hidden.

    Raises:
        ValueError: For a video whose name is not UTF-8: no list or index can hold it.
    """
    videos: list[str] = []
    others: list[str] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in visited:
            subfolders.clear()
            continue
        visited.add(real_folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        for name in names:
            if not name.startswith("."):
                path = (relative / name).as_posix()
                if is_video_name(name):
                    videos.append(path)
                else:
                    others.append(path.encode(errors="backslashreplace").decode())
    for path in videos:
        check_name(path, f"below {root}")
    return FoundFiles(sorted(videos), sorted(others))
