"""Split the videos of a source into training and validation videos.

A group of videos, such as the cuts of one recording, is in training if the hash of its name is
small enough: a fraction of all names, whatever other videos there are.

    hash of "recording_7", between 0 and 1     0 -------- training -------- 0.8 -- validation -- 1

So a group stays on its side when other videos are added or removed. The share of a class in
validation varies around the expected one; where it is less than two thirds or more than one and a
half times of that, groups nearest to the limit change sides. That may depend on the other videos,
so groups keep the sides that the indexes of an earlier run say; what was trained on never becomes
validation.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from data_tools.listed_videos import ListedVideo
from i3d_gn.video_io.index import VideoIndex, VideoRecord

_BY_PATH = ("prefix", "folder")
_PARTS = ("train", "val")

# Between a recording and the number of its cut, as in `rec7_02.mp4` and `v_Archery_g01_c05.avi`.
_SEPARATORS = "_- "


@dataclass(frozen=True)
class RandomSplit:
    """How to split.

    Attributes:
        train_fraction: Of the groups, for training.
        seed: Of the hashes.
        group_by: What a group is: "prefix" or "folder", see `group_of`, or the name of a column of
            the list; None: each video is one.
    """

    train_fraction: float
    seed: int
    group_by: str | None


@dataclass(frozen=True)
class SplitPart:
    """An index to write: `train`, `val`, or without a name all videos."""

    name: str
    index: Path
    records: list[VideoRecord]


def column_groups(
    videos: Sequence[ListedVideo], split: RandomSplit | None, *, source: Path
) -> list[str | None]:
    """The group of each listed video, None where its path says it.

    Raises:
        ValueError: The list has no such column, or a field of it is empty.
    """
    if split is None or split.group_by in (None, *_BY_PATH):
        return [None] * len(videos)
    groups: list[str | None] = []
    for video in videos:
        if split.group_by not in video.columns:
            names = ", ".join(video.columns)
            raise ValueError(
                f"--group-by {split.group_by} is neither prefix, folder nor a column of {source}, "
                + (f"which has {names}" if names else "which has no named columns")
            )
        if not video.columns[split.group_by]:
            raise ValueError(
                f"{video.where}: field {split.group_by} is empty, so that it is unclear which "
                "videos belong together; fill it in"
            )
        groups.append(video.columns[split.group_by])
    return groups


def group_of(path: str, group_by: str | None) -> str:
    """The group of the video `path`, relative to the root: videos of one group are split together.

    `prefix` is the file's name up to its last `_`, `-` or space; `folder` the name of the folder
    that the video is in. Neither depends on the class folder, so that a recording may have cuts in
    several. None: the path itself.
    """
    path = unicodedata.normalize("NFC", path)
    file = PurePosixPath(path)
    if group_by is None:
        return path
    if group_by == "folder":
        return file.parent.name
    cut = max(file.stem.rfind(separator) for separator in _SEPARATORS)
    return file.stem[:cut] if cut > 0 else file.stem


def recorded_sides(output: Path, report: Path, split: RandomSplit) -> dict[str, bool]:
    """Whether each video was in training, by path, if an earlier run split the same way.

    Args:
        output: See `split_records`.
        report: Of that run, see `IndexReport`.
        split: How to split now.
    """
    try:
        before = json.loads(report.read_text(encoding="utf-8"))
        if before["random_split"] != asdict(split):
            return {}
        return {
            path: name == "train"
            for name in _PARTS
            for path in VideoIndex.load(_part_path(output, name)).paths
        }
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is no longer whole
        return {}


def split_groups(
    groups: Sequence[str],
    labels: Sequence[int],
    *,
    train_fraction: float,
    seed: int,
    before: Mapping[str, bool] | None = None,
) -> list[bool]:
    """Whether each video is in training, from its group and label.

    Every class with several groups has one on each side, unless a group has videos of several
    classes and another one needs it elsewhere; the only group of a class is in training.

    Args:
        groups: Of each video.
        labels: Of each video.
        train_fraction: See `RandomSplit`.
        seed: See `RandomSplit`.
        before: Whether groups were in training in an earlier split. They stay there; those for
            validation may become training.
    """
    before = before or {}
    position = {group: _hash(group, seed) for group in groups}
    trained = {
        group: before.get(group, value < train_fraction) for group, value in position.items()
    }
    sizes: dict[int, Counter[str]] = defaultdict(Counter)
    for group, label in zip(groups, labels, strict=True):
        sizes[label][group] += 1
    for _, size in sorted(sizes.items()):
        expected = (1 - train_fraction) * size.total()
        least, most = math.ceil(expected * 2 / 3), math.floor(expected * 3 / 2)
        validated = sum(size[group] for group in size if not trained[group])
        num_trained = sum(trained[group] for group in size)
        # Nearest to the limit first, so that the same ones move whatever was added.
        for group in sorted(size, key=lambda g: (abs(position[g] - train_fraction), g)):
            may_leave = trained[group] and not before.get(group)
            if may_leave and validated < least and num_trained > 1:
                trained[group], num_trained = False, num_trained - 1
                validated += size[group]
            elif not trained[group] and (
                not num_trained or (validated > most and validated - size[group] >= least)
            ):
                trained[group], num_trained = True, num_trained + 1
                validated -= size[group]
    return [trained[group] for group in groups]


def split_records(
    records: Sequence[VideoRecord],
    output: Path,
    split: RandomSplit | None,
    groups: Mapping[str, str | None],
    before: Mapping[str, bool],
) -> list[SplitPart]:
    """The records of each index to write: `output`, or NAME_train and NAME_val beside it.

    Args:
        records: Of all videos.
        output: The index.
        split: None for one index.
        groups: By path, None where the path says it.
        before: Whether videos were in training, by path, see `recorded_sides`.

    Raises:
        ValueError: The records do not split, since all are in one group per class.
    """
    if not records:
        return []
    if split is None:
        return [SplitPart("", output, list(records))]
    of_records = [
        groups[record.path] or group_of(record.path, split.group_by) for record in records
    ]
    sides: dict[str, bool] = {}
    for record, group in zip(records, of_records, strict=True):
        if record.path in before:
            sides[group] = before[record.path] or sides.get(group, False)
    trained = split_groups(
        of_records,
        [record.label for record in records],
        train_fraction=split.train_fraction,
        seed=split.seed,
        before=sides,
    )
    parts = [
        SplitPart(
            name,
            _part_path(output, name),
            [r for r, is_trained in zip(records, trained, strict=True) if is_trained == side],
        )
        for name, side in zip(_PARTS, (True, False), strict=True)
    ]
    for part in parts:
        if not part.records:
            raise ValueError(
                f"the {len(records)} usable videos do not split: none is left for {part.name}, "
                f"since {_why(split.group_by)}"
            )
    return parts


def _part_path(output: Path, name: str) -> Path:
    return output.with_name(f"{output.stem}_{name}.parquet")


def _why(group_by: str | None) -> str:
    if group_by is None:
        return "no class has two videos"
    return f"no class has videos of two groups; leave out --group-by {group_by}, or rename videos"


def _hash(group: str, seed: int) -> float:
    """A number in [0, 1), a function of its arguments on any machine."""
    digest = hashlib.sha256(f"{seed}\n{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
