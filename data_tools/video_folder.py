"""Match the entries of a list with the files of a folder."""

from __future__ import annotations

import os
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_tools.listed_videos import Annotations, ListedVideo, split_segment_name
from i3d_gn.video_io.find_videos import find_files, is_video_name


@dataclass(frozen=True)
class FoundVideo:
    """The file of an entry: its path relative to the folder, None if not found.

    `alternatives` are other files that match the entry; `reason` says why there is no file.
    """

    path: str | None
    alternatives: tuple[str, ...] = ()
    reason: str = ""


def video_folder(source: Path, annotations: Annotations, videos: Path | None) -> Path:
    """The absolute path of the folder with the videos of the list or folder `source`.

    Args:
        source: What `annotations` was read from.
        annotations: The entries.
        videos: The folder given by --videos, if any.

    Raises:
        ValueError: If the folder is missing, redundant or not a folder.
    """
    names_ids = not all(video.is_path for video in annotations.videos)
    if source.is_dir() and not names_ids:
        if videos is not None:
            raise ValueError(
                f"{source} is the folder of the videos itself, so --videos does not apply"
            )
        return source.absolute()
    if videos is None:
        if names_ids:
            raise ValueError(
                f"{source} ({annotations.kind}) names videos by id; pass their folder as --videos"
            )
        return source.parent.absolute()
    if not videos.is_dir():
        raise ValueError(f"--videos {videos} is not a folder")
    return videos.absolute()


def find_listed_videos(videos: Sequence[ListedVideo], folder: Path) -> list[FoundVideo]:
    """Find the file of each entry.

    An entry that is a path with a video extension matches that file only; without, it matches with
    any video extension. Other entries are searched by name in `folder` and its subfolders: first
    `<id>_<start>_<end>`, then `<id>`, then the id with other times among the files that no other
    entry matched. A file in a folder called `replacement...`, where the CVDF release has better
    copies of corrupted videos, has precedence. Names match in any normal form of Unicode.
    """
    found = {
        i: _relative_to(folder, video.name)
        for i, video in enumerate(videos)
        if video.is_path and os.path.isfile(folder / video.name)
    }
    result = [FoundVideo(found.get(i)) for i in range(len(videos))]
    rest = [i for i in range(len(videos)) if i not in found]
    if not rest:
        return result
    files = _FilesByName(folder)
    taken: set[str] = set()
    for i in rest:
        result[i] = files.of_path(videos[i]) if videos[i].is_path else files.of_id(videos[i])
        if not videos[i].is_path:
            taken.update(files.with_id(videos[i], replacements_only=True) or _all_of(result[i]))
    for i in rest:
        if result[i].path is None and not videos[i].is_path:
            left = [path for path in files.with_id(videos[i]) if path not in taken]
            result[i] = _choose(left, videos[i])
            taken.update(left)
    return [
        # A broken link is found by name, but is not a file.
        file
        if file.path is not None and os.path.isfile(folder / file.path)
        else FoundVideo(None, reason=_reason(folder, video.name))
        for video, file in zip(videos, result, strict=True)
    ]


class _FilesByName:
    """The videos of a folder by path, stem and id, in one normal form of Unicode."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._by_path: dict[str, str] = {}
        self._by_path_stem: dict[str, list[str]] = defaultdict(list)
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        self._by_id: dict[str, list[str]] = defaultdict(list)
        for path in find_files(folder).videos:
            name = PurePosixPath(_normal_form(path))
            self._by_path[str(name)] = path
            self._by_path_stem[str(name.with_suffix(""))].append(path)
            self._by_stem[name.stem].append(path)
            self._by_id[split_segment_name(name.stem)].append(path)

    def of_path(self, video: ListedVideo) -> FoundVideo:
        """The file of an entry that is a path."""
        name = _normal_form(_relative_to(self._folder, video.name))
        if is_video_name(name):
            return FoundVideo(self._by_path.get(name))
        files = self._by_path_stem.get(name) or ([] if "/" in name else self._by_stem.get(name, []))
        return _choose(files, video)

    def of_id(self, video: ListedVideo) -> FoundVideo:
        """The file of an entry that is an id: a replacement, or one with its name or its id."""
        replacements = self.with_id(video, replacements_only=True)
        if replacements:
            return FoundVideo(replacements[0])
        names = (_normal_form(video.name), _normal_form(video.video_id))
        return _choose(self._by_stem.get(names[0]) or self._by_stem.get(names[1]) or [], video)

    def with_id(self, video: ListedVideo, *, replacements_only: bool = False) -> list[str]:
        """Files with the id of an entry, with any times."""
        return [
            path
            for path in self._by_id.get(_normal_form(video.video_id), ())
            if _is_replacement(path) or not replacements_only
        ]


def _is_replacement(path: str) -> bool:
    return any(part.startswith("replacement") for part in PurePosixPath(path).parts[:-1])


def _choose(files: Sequence[str], video: ListedVideo) -> FoundVideo:
    """Of several files prefer one in the folder of its class, then mp4, then the first by name."""
    label = _normal_form(str(video.label or "")).replace(" ", "_")

    def preference(path: str) -> tuple[bool, bool, str]:
        parts = PurePosixPath(path)
        in_class_folder = _normal_form(parts.parent.name).replace(" ", "_") == label
        return not in_class_folder, parts.suffix.lower() != ".mp4", path

    first, *others = sorted(files, key=preference) or [None]
    return FoundVideo(first, tuple(filter(None, others)))


def _all_of(file: FoundVideo) -> tuple[str, ...]:
    return () if file.path is None else (file.path, *file.alternatives)


def _reason(folder: Path, name: str) -> str:
    """Why an entry has no file."""
    path, _, num_frames = name.rpartition(" ")
    # Lists of frames have lines `path num_frames label`.
    without_number = path if path and num_frames.isdecimal() else name
    if os.path.isdir(folder / name) or os.path.isdir(folder / without_number):
        return "a folder, not a file; folders of frames are not supported (see docs/data.md)"
    return "no such file"


def _normal_form(name: str) -> str:
    """NFC: file names on macOS have accented letters decomposed, lists may not."""
    return unicodedata.normalize("NFC", name)


def _relative_to(folder: Path, path: str) -> str:
    """`path` as written to the index: relative to `folder` if below it."""
    file = Path(os.path.normpath((folder / path).absolute()))
    return (file.relative_to(folder) if file.is_relative_to(folder) else file).as_posix()
