"""Read the split files of HMDB51: `<class>_test_split<k>.txt` with lines `<file> <0, 1 or 2>`."""

from __future__ import annotations

import re
from pathlib import Path

from data_tools.listed_videos import Annotations, ListedVideo, select_split

_FILE_NAME = re.compile(r"(?P<label>.+)_test_split(?P<number>[123])\.txt")
# Videos marked 0 are in neither part of a split.
_PARTS = {"1": "train", "2": "test"}


def is_split_file(path: Path) -> bool:
    """Whether `path` has the name of a split file."""
    return _FILE_NAME.fullmatch(path.name) is not None


def read_hmdb51_splits(folder: Path, *, split: str | None) -> Annotations:
    """Read all split files of `folder`; splits are train1, test1, train2, test2, train3, test3.

    Raises:
        ValueError: For malformed lines, and unless `split` is one of the splits.
    """
    videos, splits, classes = [], [], set()
    for path in sorted(folder.iterdir()):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            continue
        classes.add(match["label"])
        for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
            name, _, part = line.strip().rpartition(" ")
            where = f"{path.name}:{number}"
            if line.strip() and (not name or part not in {"0", *_PARTS}):
                raise ValueError(f"{where}: {line!r} is not `file 0`, `file 1` or `file 2`")
            if part in _PARTS:
                videos.append(
                    ListedVideo(
                        name=Path(name.strip()).stem,
                        label=match["label"],
                        where=where,
                        is_path=False,
                    )
                )
                splits.append(_PARTS[part] + match["number"])
    return Annotations(
        kind="HMDB51 split files",
        videos=select_split(folder, videos, splits, split=split),
        further_class_names=tuple(sorted(classes)),
    )
