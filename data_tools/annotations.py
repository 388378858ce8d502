"""Read lists of videos and labels in the common formats.

    source                      video named by               label
    official Kinetics CSV       youtube_id and segment       name, none in the test list
    JSON of 3D-ResNets-PyTorch  key in `database`            name
    CSV with `path,label`       path                         name or id
    `path label` list           path                         name or id, after the last space
    folder of class folders     path in the folder           name of the class folder

Whether the listed files exist is not checked here.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.class_names import Label
from data_tools.find_videos import find_videos, is_video_name

_SPLITS = {"training": "train", "validation": "val", "validate": "val", "testing": "test"}
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True, kw_only=True)
class ListedVideo:
    """One entry of a list.

    Attributes:
        name: If `is_path`, a path, absolute or relative to the folder of videos; otherwise the
            video is any file with the stem `name` or `video_id`.
        label: Class name or id, None if the list has no label for it.
        where: The place in the list, for messages (`val.csv:17`).
        is_path: Whether `name` is a path.
        video_id: The YouTube id.
    """

    name: str
    label: Label
    where: str
    is_path: bool
    video_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """Contents of a list.

    Attributes:
        kind: The detected format.
        videos: The entries, in the order of the list.
        further_class_names: Classes that the source names, whether or not a video has them.
    """

    kind: str
    videos: list[ListedVideo]
    further_class_names: tuple[str, ...] = ()


def read_annotations(source: Path, *, split: str | None = None) -> Annotations:
    """Read `source`; its format is detected from its contents.

    Args:
        source: A list, or a folder of class folders.
        split: The split to select from an official CSV or a JSON (train, val, test, or as spelled
            in the source); required if the source has more than one.

    Raises:
        ValueError: For malformed entries, naming the line, and for a source without videos.
    """
    if source.is_dir():
        annotations = _read_class_folders(source)
    elif not source.is_file():
        raise ValueError(f"list or folder not found: {source}")
    elif source.suffix.lower() == ".json":
        annotations = _read_json(source, split=split)
    else:
        annotations = _read_text(source, split=split)
    if not annotations.videos:
        raise ValueError(f"{source} ({annotations.kind}) lists no videos")
    return annotations


def _read_text(source: Path, *, split: str | None) -> Annotations:
    try:
        text = source.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not a UTF-8 text file: {error}") from None
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    header = {name.strip() for name in next(csv.reader([first_line]), [])}
    if "youtube_id" in header:
        return _read_official_csv(source, text, split=split)
    if split is not None:
        raise ValueError(f"{source} has no splits, so --split {split} does not apply")
    if {"path", "label"} <= header:
        return _read_path_label_csv(source, text)
    return _read_path_label_list(source, text)


def _read_official_csv(source: Path, text: str, *, split: str | None) -> Annotations:
    """`label,youtube_id,time_start,time_end,split[,is_cc]`; the test list has no label."""
    videos, splits = [], []
    for where, row in _csv_rows(source, text, required=("youtube_id", "time_start", "time_end")):
        youtube_id = row["youtube_id"]
        try:
            start, end = int(row["time_start"]), int(row["time_end"])
        except ValueError:
            raise ValueError(
                f"{where}: time_start and time_end must be integer seconds, not "
                f"{row['time_start']!r} and {row['time_end']!r}"
            ) from None
        videos.append(
            ListedVideo(
                name=f"{youtube_id}_{start:06d}_{end:06d}",
                video_id=youtube_id,
                label=row.get("label") or None,
                where=where,
                is_path=False,
            )
        )
        splits.append(row.get("split") or "")
    return Annotations(
        kind="official Kinetics CSV", videos=_of_split(source, videos, splits, split=split)
    )


def _read_json(source: Path, *, split: str | None) -> Annotations:
    """`{"labels": [...], "database": {key: {"subset": ..., "annotations": {"label": ...}}}}`."""
    try:
        document = json.loads(source.read_text("utf-8-sig"))
        database = document["database"]
        videos, splits = [], []
        for key, entry in database.items():
            label = (entry.get("annotations") or {}).get("label")
            if not isinstance(label, int | str | None) or not isinstance(entry["subset"], str):
                raise TypeError(f"{key} has the label {label!r} and the subset {entry['subset']!r}")
            videos.append(
                ListedVideo(
                    name=key,
                    video_id=split_segment_name(key),
                    label=label,
                    where=f"{source.name}: {key}",
                    is_path=False,
                )
            )
            splits.append(entry["subset"])
        further_names = tuple(document.get("labels", ()))
        if not all(isinstance(name, str) for name in further_names):
            raise TypeError(f"labels must be strings, not {further_names!r:.80}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{source} is not in the JSON format of 3D-ResNets-PyTorch "
            f"(database -> id -> subset, annotations.label): {type(error).__name__}: {error}"
        ) from error
    return Annotations(
        kind="3D-ResNets JSON",
        videos=_of_split(source, videos, splits, split=split),
        further_class_names=further_names,
    )


def _read_path_label_csv(source: Path, text: str) -> Annotations:
    videos = [
        ListedVideo(name=row["path"], label=_label(row["label"]), where=where, is_path=True)
        for where, row in _csv_rows(source, text, required=("path", "label"))
    ]
    return Annotations(kind="CSV with path,label", videos=videos)


def _read_path_label_list(source: Path, text: str) -> Annotations:
    """`path label` lines of mmaction2, PySlowFast and [NL]; a `path` alone has no label.

    Paths may contain spaces: the label follows the last one. `path,label` lines without a header
    are read too.
    """
    videos = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line:
            continue
        where = f"{source.name}:{number}"
        if is_video_name(line):
            path, label = line, ""
        else:
            parts = line.rsplit("," if _COMMA_BEFORE_LABEL.search(line) else None, 1)
            if len(parts) < 2:
                raise ValueError(
                    f"{where}: {line!r} is neither `path label` nor the path of a video; "
                    "see --help for the supported formats"
                )
            path, label = parts[0].rstrip(), parts[1]
        videos.append(ListedVideo(name=path, label=_label(label), where=where, is_path=True))
    return Annotations(kind="`path label` list", videos=videos)


# In `clip.mp4,3` the comma follows an extension, in `a, b.mp4 3` it does not.
_COMMA_BEFORE_LABEL = re.compile(r"\.\w{2,4},[^,/]+$")


def _read_class_folders(root: Path) -> Annotations:
    """`root/<class>/.../<video>`.

    A folder without videos is a class too: ids must not depend on which videos are missing.
    """
    classes = sorted(
        entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    videos = [
        ListedVideo(
            name=path, label=path.partition("/")[0], where=f"folder {root.name}", is_path=True
        )
        for path in find_videos(root)
        if "/" in path
    ]
    if not videos:
        raise ValueError(
            f"{root} has no class folders with videos (expected <class>/<video>.mp4); for a flat "
            "folder, pass its list as SOURCE and the folder as --videos"
        )
    return Annotations(kind="class folders", videos=videos, further_class_names=tuple(classes))


def split_segment_name(stem: str) -> str:
    """The YouTube id in a file stem `<id>_<start:06d>_<end:06d>`, or the whole stem."""
    match = _SEGMENT_NAME.fullmatch(stem)
    return match["id"] if match else stem


# Ids may contain and begin with "_" and "-", so only the end identifies the segment.
_SEGMENT_NAME = re.compile(r"(?P<id>.+)_\d{6}_\d{6}")


def _csv_rows(
    source: Path, text: str, *, required: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place in the list, row with values stripped); blank lines are skipped."""
    reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    for row in reader:
        where = f"{source.name}:{reader.line_num}"
        if None in row or any(value is None for value in row.values()):
            raise ValueError(
                f"{where}: expected the {len(reader.fieldnames)} fields "
                f"{','.join(reader.fieldnames)}; quote names that contain a comma"
            )
        stripped = {name: value.strip() for name, value in row.items()}
        for name in required:
            if not stripped.get(name):
                raise ValueError(f"{where}: field {name} is missing or empty")
        yield where, stripped


def _of_split(
    source: Path, videos: list[ListedVideo], splits: list[str], *, split: str | None
) -> list[ListedVideo]:
    present = sorted(set(splits))
    if split is None:
        if len(present) > 1:
            raise ValueError(
                f"{source} has the splits {', '.join(present)}; select one with --split"
            )
        return videos
    wanted = _SPLITS.get(split, split)
    chosen = [v for v, s in zip(videos, splits, strict=True) if _SPLITS.get(s, s) == wanted]
    if not chosen:
        raise ValueError(f"{source} has no split {split!r}, only {', '.join(present)}")
    return chosen


def _label(text: str) -> Label:
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    return text or None
