"""Read a label map: the class names of a data set in the order of their ids."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_tools.class_spelling import check_official_order, ids_by_class, spelled
from i3d_gn.video_io.index import VideoIndex

# `1 Archery`, as in UCF101's classInd.txt.
_NUMBERED_NAME = re.compile(r"(\d+)[\s,;:]\s*(\S.*)")


@dataclass(frozen=True)
class LabelMap:
    """Class names in the order of their ids; lists number the classes from `first_number`."""

    names: list[str]
    first_number: int = 0


def read_label_map(path: Path) -> LabelMap:
    """Read a text file (one name per line, or `number name`), a JSON (name -> id) or an index.

    Raises:
        ValueError: For an empty list, a name that occurs twice, or the classes of Kinetics-400 in
            another order than the official one.
    """
    if path.suffix == ".parquet":
        label_map = LabelMap(list(VideoIndex.load(path).class_names))
    elif not path.is_file():
        raise ValueError(
            f"label map not found: {path} (a text file with one class name per line, or an index)"
        )
    elif path.suffix.lower() == ".json":
        label_map = _read_json_label_map(path)
    else:
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"label map {path} is not a UTF-8 text file: {error}") from None
        names = [spelled(line) for line in lines if line.strip()]
        label_map = _numbered(names) or LabelMap(names)
    if not label_map.names:
        raise ValueError(f"label map {path} is empty")
    ids_by_class(label_map.names, source=str(path))
    check_official_order(label_map.names, source=str(path))
    return label_map


def _numbered(lines: Sequence[str]) -> LabelMap | None:
    """The label map of lines `number name`; None unless they count from 0 or 1."""
    matches = [_NUMBERED_NAME.fullmatch(line) for line in lines]
    names = {int(match[1]): spelled(match[2]) for match in matches if match}
    numbers = sorted(names)
    if len(names) < len(lines) or numbers[:1] not in ([0], [1]):
        return None
    if numbers[-1] - numbers[0] != len(numbers) - 1:
        return None
    return LabelMap([names[number] for number in numbers], numbers[0])


def _read_json_label_map(path: Path) -> LabelMap:
    """`{name: id}`, as of Something-Something."""
    try:
        ids = json.loads(path.read_text("utf-8-sig"))
        names = {int(i): spelled(name) for name, i in ids.items()}
        if len(names) < len(ids) or sorted(names) != list(range(len(ids))):
            raise ValueError("ids must be 0, 1, 2, ...")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"label map {path} is not a JSON of `name: id`: {error}") from error
    return LabelMap([names[i] for i in range(len(ids))])
