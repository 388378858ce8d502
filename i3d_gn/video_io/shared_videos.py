"""Find the videos that two indexes share, for instance training and validation."""

from __future__ import annotations

import filecmp
import os
import re
from collections import defaultdict
from pathlib import PurePosixPath
from typing import NamedTuple

from i3d_gn.video_io.index import VideoIndex

# File names of Kinetics, `<YouTube id>_<start>_<end>`; ids may contain and begin with "_" and "-".
_SEGMENT_NAME = re.compile(r"(?P<id>.+)_\d{6}_\d{6}")


class SharedVideo(NamedTuple):
    """A video of one index, the one that it equals in the other, and in what they are equal."""

    path: str
    other_path: str
    equal: str


def shared_videos(index: VideoIndex, other: VideoIndex) -> list[SharedVideo]:
    """Videos of `index` that are the same file, or have the same YouTube id or bytes as in `other`.

    Files are compared only if their size and number of frames are equal. Packed videos are compared
    by id only.
    """
    by_id: dict[str, str] = {}
    by_file: dict[tuple[int, int], str] = {}
    by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, path in enumerate(other.paths):
        if video_id := _youtube_id(path):
            by_id[video_id] = path
        if status := _status(other, i):
            by_file[status.st_dev, status.st_ino] = path
            by_size[_size(other, i, status)].append(i)
    shared = []
    for i, path in enumerate(index.paths):
        status = _status(index, i)
        if status and (status.st_dev, status.st_ino) in by_file:
            found = by_file[status.st_dev, status.st_ino]
            shared.append(SharedVideo(path, found, "file"))
        elif (video_id := _youtube_id(path)) in by_id:
            shared.append(SharedVideo(path, by_id[video_id], "YouTube id"))
        elif status:
            for j in by_size.get(_size(index, i, status), ()):
                if _have_equal_bytes(index, i, other, j):
                    shared.append(SharedVideo(path, other.paths[j], "content"))
                    break
    return shared


def _youtube_id(path: str) -> str:
    match = _SEGMENT_NAME.fullmatch(PurePosixPath(path).stem)
    return match["id"] if match else ""


def _status(index: VideoIndex, i: int) -> os.stat_result | None:
    if index.is_packed:
        return None
    try:
        return os.stat(index.path_of(i))
    except OSError:
        return None


def _size(index: VideoIndex, i: int, status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, index.num_frames[i], index.widths[i], index.heights[i]


def _have_equal_bytes(index: VideoIndex, i: int, other: VideoIndex, j: int) -> bool:
    try:
        return filecmp.cmp(index.path_of(i), other.path_of(j), shallow=False)
    except OSError:
        return False
