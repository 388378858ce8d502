"""Split the videos of a source into training and validation videos.

A group of videos, such as the cuts of one recording, is in training if the hash of its name is
small enough: a fraction of all names, whatever other videos there are.

    hash of "recording_7", between 0 and 1     0 -------- training -------- 0.8 -- validation -- 1

So a group stays on its side when other videos are added or removed. The share of a class in
validation varies around the expected one; where it is less than two thirds or more than one and a
half times of that, groups nearest to the limit change sides.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from i3d_gn.video_io.index import VideoRecord

GroupBy = Literal["prefix", "folder"]

# Between a recording and the number of its cut, as in `rec7_02.mp4` and `v_Archery_g01_c05.avi`.
_SEPARATORS = "_- "


@dataclass(frozen=True)
class RandomSplit:
    """How to split: the fraction of groups for training, the seed, and what a group is."""

    train_fraction: float
    seed: int
    group_by: GroupBy | None


@dataclass(frozen=True)
class SplitPart:
    """An index to write: `train`, `val`, or without a name all videos."""

    name: str
    index: Path
    records: list[VideoRecord]


def group_of(path: str, group_by: GroupBy | None) -> str:
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


def split_groups(
    groups: Sequence[str], labels: Sequence[int], *, train_fraction: float, seed: int
) -> list[bool]:
    """Whether each video is in training, from its group and label.

    Every class with several groups has one on each side, unless a group has videos of several
    classes and another one needs it elsewhere; the only group of a class is in training.
    """
    position = {group: _hash(group, seed) for group in groups}
    trained = {group: value < train_fraction for group, value in position.items()}
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
            if trained[group] and validated < least and num_trained > 1:
                trained[group], num_trained = False, num_trained - 1
                validated += size[group]
            elif not trained[group] and (
                not num_trained or (validated > most and validated - size[group] >= least)
            ):
                trained[group], num_trained = True, num_trained + 1
                validated -= size[group]
    return [trained[group] for group in groups]


def split_records(
    records: Sequence[VideoRecord], output: Path, split: RandomSplit | None
) -> list[SplitPart]:
    """The records of each index to write: `output`, or NAME_train and NAME_val beside it.

    Raises:
        ValueError: The records do not split, since all are in one group per class.
    """
    if not records:
        return []
    if split is None:
        return [SplitPart("", output, list(records))]
    trained = split_groups(
        [group_of(record.path, split.group_by) for record in records],
        [record.label for record in records],
        train_fraction=split.train_fraction,
        seed=split.seed,
    )
    parts = [
        SplitPart(
            name,
            output.with_name(f"{output.stem}_{name}.parquet"),
            [r for r, is_trained in zip(records, trained, strict=True) if is_trained == side],
        )
        for name, side in (("train", True), ("val", False))
    ]
    for part in parts:
        if not part.records:
            raise ValueError(
                f"the {len(records)} usable videos do not split: none is left for {part.name}, "
                f"since {_why(split.group_by)}"
            )
    return parts


def _why(group_by: GroupBy | None) -> str:
    if group_by is None:
        return "no class has two videos"
    return f"no class has videos of two groups; leave out --group-by {group_by}, or rename videos"


def _hash(group: str, seed: int) -> float:
    """A number in [0, 1), a function of its arguments on any machine."""
    digest = hashlib.sha256(f"{seed}\n{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
