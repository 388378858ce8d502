"""Match the entries of a list with the files of a folder."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_tools.annotations import Annotations, ListedVideo, split_segment_name
from data_tools.find_videos import find_videos


@dataclass(frozen=True)
class FoundVideo:
    """The file of an entry: its path relative to the folder, None if not found.

    `alternatives` are other files that match the entry.
    """

    path: str | None
    alternatives: tuple[str, ...] = ()


def video_folder(source: Path, annotations: Annotations, videos: Path | None) -> Path:
    """The absolute path of the folder with the videos of the list or folder `source`.

    Args:
        source: What `annotations` was read from.
        annotations: The entries.
        videos: The folder given by --videos, if any.

    Raises:
        ValueError: If the folder is missing, redundant or not a folder.
    """
    if source.is_dir():
        if videos is not None:
            raise ValueError(
                f"{source} is the folder of the videos itself, so --videos does not apply"
            )
        return source.absolute()
    if videos is None:
        if not all(video.is_path for video in annotations.videos):
            raise ValueError(
                f"{source} ({annotations.kind}) names videos by id; pass their folder as --videos"
            )
        return source.parent.absolute()
    if not videos.is_dir():
        raise ValueError(f"--videos {videos} is not a folder")
    return videos.absolute()


def find_listed_videos(videos: Sequence[ListedVideo], folder: Path) -> list[FoundVideo]:
    """Find the file of each entry.

    An entry that is a path matches that file only. Other entries are searched by name in `folder`
    and its subfolders, with any video extension: first `<id>_<start>_<end>`, then `<id>`, then the
    id with other times among the files that no other entry matched. A file in a folder called
    `replacement...`, where the CVDF release has better copies of corrupted videos, has precedence.
    """
    found: list[FoundVideo | None] = [None] * len(videos)
    by_name = [i for i, video in enumerate(videos) if not video.is_path]
    for i, video in enumerate(videos):
        if video.is_path:
            found[i] = FoundVideo(_relative_to(folder, video.name))
    if by_name:
        files_by_stem, files_by_id = defaultdict(list), defaultdict(list)
        for path in find_videos(folder):
            stem = PurePosixPath(path).stem
            files_by_stem[stem].append(path)
            files_by_id[split_segment_name(stem)].append(path)
        taken: set[str] = set()
        for i in by_name:
            video = videos[i]
            files = files_by_stem.get(video.name) or files_by_stem.get(video.video_id)
            replacing = [path for path in files_by_id[video.video_id] if _is_replacement(path)]
            if replacing:
                found[i] = FoundVideo(replacing[0])
                taken.update(replacing)
            elif files:
                found[i] = _choose(files, video)
                taken.update(files)
        for i in by_name:
            if found[i] is None:
                left = [path for path in files_by_id[videos[i].video_id] if path not in taken]
                found[i] = _choose(left, videos[i]) if left else FoundVideo(None)
                taken.update(left)
    # A broken link is found by name, but is not a file.
    return [
        video if video and video.path and (folder / video.path).is_file() else FoundVideo(None)
        for video in found
    ]


def _is_replacement(path: str) -> bool:
    return any(part.startswith("replacement") for part in PurePosixPath(path).parts[:-1])


def _choose(files: list[str], video: ListedVideo) -> FoundVideo:
    """Of several files prefer one in the folder of its class, then mp4, then the first by name."""
    label = str(video.label or "").replace(" ", "_")

    def preference(path: str) -> tuple[bool, bool, str]:
        parts = PurePosixPath(path)
        in_class_folder = parts.parent.name.replace(" ", "_") == label
        return not in_class_folder, parts.suffix.lower() != ".mp4", path

    first, *others = sorted(files, key=preference)
    return FoundVideo(first, tuple(others))


def _relative_to(folder: Path, path: str) -> str:
    """`path` as written to the index: relative to `folder` if below it."""
    file = Path(os.path.normpath((folder / path).absolute()))
    return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()
