"""Entries of a list of videos, independent of its format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.class_names import Label

# Spellings of the splits; other names are kept.
_SPLITS = {"training": "train", "validation": "val", "validate": "val", "testing": "test"}
# pandas writes ids as `3.0` if any is missing.
_INTEGER = re.compile(r"-?\d+(\.0+)?")
_OTHER_NUMBER = re.compile(r"-?\d+\.\d+")
# Ids may contain and begin with "_" and "-", so only the end identifies the segment.
_SEGMENT_NAME = re.compile(r"(?P<id>.+)_\d{6}_\d{6}")


@dataclass(frozen=True, kw_only=True)
class ListedVideo:
    """One entry of a list.

    Attributes:
        name: If `is_path`, a path, absolute or relative to the folder of videos; otherwise the
            video is any file with the stem `name` or `video_id`.
        label: Class name or id, None if the list has no label for it.
        where: The place in the list, for messages (`val.csv:17`).
        is_path: Whether `name` is a path. One without a video extension may lack its extension.
        video_id: The YouTube id.
        columns: All fields of the line by column name, if the list has a header.
    """

    name: str
    label: Label
    where: str
    is_path: bool
    video_id: str = ""
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Contents of a list.

    Attributes:
        kind: The detected format.
        videos: The entries, in the order of the list.
        further_class_names: Classes that the source names, whether or not a video has them.
        skipped: Files of a folder that are not entries.
    """

    kind: str
    videos: list[ListedVideo]
    further_class_names: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def parse_label(text: str, *, where: str) -> Label:
    """An id, a name, or None for empty `text`."""
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text.partition(".")[0])
    if _OTHER_NUMBER.fullmatch(text):
        raise ValueError(f"{where}: label {text} is neither an integer id nor a name")
    return text or None


def select_split(
    source: Path, videos: Sequence[ListedVideo], splits: Sequence[str], *, split: str | None
) -> list[ListedVideo]:
    """The videos whose entry in `splits` is `split`; None selects the only one there is.

    Raises:
        ValueError: If `split` does not occur, or is None while there are several.
    """
    present = sorted(set(splits))
    if split is None:
        if len(present) > 1:
            raise ValueError(
                f"{source} has the splits {', '.join(present)}; select one with --split"
            )
        return list(videos)
    wanted = _SPLITS.get(split, split)
    selected = [v for v, s in zip(videos, splits, strict=True) if _SPLITS.get(s, s) == wanted]
    if not selected:
        raise ValueError(f"{source} has no split {split!r}, only {', '.join(present)}")
    return selected


def segment_name(video_id: str, start_seconds: int, end_seconds: int) -> str:
    """The file stem of a clip of Kinetics."""
    return f"{video_id}_{start_seconds:06d}_{end_seconds:06d}"


def split_segment_name(stem: str) -> str:
    """The YouTube id in a file stem made by `segment_name`, or the whole stem."""
    match = _SEGMENT_NAME.fullmatch(stem)
    return match["id"] if match else stem
