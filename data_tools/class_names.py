"""Class names and ids: one class list, in one order, for all splits of a data set."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import PurePosixPath

from data_tools.class_spelling import class_key, ids_by_class, is_kinetics_400, spelled
from data_tools.label_map import LabelMap
from i3d_gn.video_io.index_table import UNKNOWN_LABEL

# A label in a list: an id, a name, or None for an unlabeled video.
Label = int | str | None

# More than any data set has: a larger number is not a label but a time, a size or another id.
_MAX_CLASSES = 1_000_000


def label_ids(
    labels: Sequence[Label],
    *,
    where: Sequence[str],
    label_map: LabelMap | None,
    further_names: Sequence[str] = (),
    source: str,
) -> tuple[list[str], list[int]]:
    """Return the class list, and the id of each label in it (-1 for None).

    Names match the class list with spaces and underscores being equal. A number is the name of a
    class if all names are numbers, and else counts from the first class.

    Args:
        labels: All names or all numbers.
        where: The place of each label, for messages.
        label_map: The class list. If None, it is all names in `labels` and `further_names`, sorted
            as Python sorts, which is the official order of Kinetics, or by value if all are
            numbers.
        further_names: Classes without a video.
        source: Name of the label map or list, for messages.

    Raises:
        ValueError: For a label that is not in the class list, names mixed with numbers, and numbers
            from 1 without a label map.
    """
    first_number = next((i for i, label in enumerate(labels) if isinstance(label, int)), None)
    first_name = next((i for i, label in enumerate(labels) if isinstance(label, str)), None)
    if first_number is not None and first_name is not None:
        raise ValueError(
            f"labels must be all names or all ids, but {where[first_number]} has the id "
            f"{labels[first_number]} and {where[first_name]} the name {labels[first_name]!r}"
        )
    if label_map is None:
        label_map = LabelMap(_class_list(labels, where=where, further_names=further_names))

    names = label_map.names
    ids_by_key = ids_by_class(names, source=source)
    numbers_are_names = all(name.isdecimal() for name in names)
    ids = []
    unknown: dict[Label, str] = {}
    for label, place in zip(labels, where, strict=True):
        if label is None or label == UNKNOWN_LABEL:
            ids.append(UNKNOWN_LABEL)
            continue
        if isinstance(label, str) or numbers_are_names:
            i = ids_by_key.get(class_key(str(label)))
        else:
            i = label - label_map.first_number
        if i is None or not 0 <= i < len(names):
            unknown.setdefault(label, place)
        else:
            ids.append(i)
    if unknown:
        raise ValueError(_unknown_message(unknown, names, source=source))
    return names, ids


def _class_list(
    labels: Sequence[Label], *, where: Sequence[str], further_names: Sequence[str]
) -> list[str]:
    """The class list of a source without a label map."""
    numbers = {label: i for i, label in enumerate(labels) if isinstance(label, int) and label >= 0}
    if numbers:
        largest, smallest = max(numbers), min(numbers)
        if largest >= _MAX_CLASSES:
            raise ValueError(
                f"label {largest} ({where[numbers[largest]]}) would mean {largest + 1} classes, "
                f"more than the limit of {_MAX_CLASSES}; is it a label? Lines are `path label`"
            )
        if smallest == 1:
            raise ValueError(
                f"labels are numbers from 1 ({where[numbers[1]]}), so it is unclear whether they "
                "count from 0 or from 1; pass a --label-map: one name per line if from 0, or lines "
                "`number name` if from 1"
            )
        return [str(i) for i in range(largest + 1)]
    names = {spelled(label) for label in labels if isinstance(label, str)}
    names |= {spelled(name) for name in further_names}
    merged = _merge_spellings(sorted(names))
    if all(name.isdecimal() for name in merged):
        return sorted(merged, key=int)
    if is_kinetics_400(merged):
        # With both spellings in use, "playing_drums" would sort after "playing guitar".
        return sorted(merged, key=class_key)
    return merged


def labels_from_folders(paths: Sequence[str], class_names: Sequence[str]) -> list[str] | None:
    """The class named like a folder of the path, for each path; None unless all have one."""
    classes = {class_key(name): name for name in class_names}
    labels = [
        next(
            (classes[class_key(part)] for part in parts[-2::-1] if class_key(part) in classes), None
        )
        for parts in (PurePosixPath(path).parts for path in paths)
    ]
    return [label for label in labels if label is not None] if None not in labels else None


def check_folders(
    paths: Sequence[str], ids: Sequence[int], *, where: Sequence[str], class_names: Sequence[str]
) -> None:
    """Raise `ValueError` if most paths are in a folder with the name of another class.

    This happens if the list counts classes from 1 but the label map from 0, or if their orders
    differ. Folders whose names are numbers are ignored: they need not be classes.
    """
    classes = {class_key(name): i for i, name in enumerate(class_names) if not name.isdecimal()}
    num_agreeing, first_contradiction, num_contradicting = 0, "", 0
    for path, i, place in zip(paths, ids, where, strict=True):
        folders = {part for part in PurePosixPath(path).parts[:-1] if class_key(part) in classes}
        if not folders or i == UNKNOWN_LABEL:
            continue
        if i in {classes[class_key(folder)] for folder in folders}:
            num_agreeing += 1
        else:
            num_contradicting += 1
            first_contradiction = first_contradiction or (
                f"{path} ({place}) is labeled {class_names[i]!r}"
            )
    if num_contradicting > num_agreeing:
        raise ValueError(
            f"{first_contradiction}, but is in the folder of another class, as are "
            f"{num_contradicting - 1} more; the list and the --label-map must number the classes "
            "alike (if the list counts from 1, use lines `1 NAME`, `2 NAME`, ...)"
        )


def _unknown_message(unknown: dict[Label, str], class_names: Sequence[str], *, source: str) -> str:
    label, place = next(iter(unknown.items()))
    if isinstance(label, int):
        problem = (
            f"label {label} ({place}) is not an id of the {len(class_names)} classes of {source}"
        )
    else:
        nearest = difflib.get_close_matches(str(label), class_names, n=1)
        hint = f", did you mean {nearest[0]!r}?" if nearest else ""
        problem = (
            f"class {label!r} ({place}) is not one of the {len(class_names)} of {source}{hint}"
        )
    others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return (
        f"{problem}{others}; train and val must share one class list: pass the same complete "
        "--label-map for both (a file with one name per line in the order of the ids, or the index "
        "of the split that has all classes)"
    )


def _merge_spellings(names: list[str]) -> list[str]:
    """One spelling per class: of `air drumming` and `air_drumming`, the one with spaces."""
    first_spelling: dict[str, str] = {}
    for name in names:
        first_spelling.setdefault(class_key(name), name)
    return list(first_spelling.values())
