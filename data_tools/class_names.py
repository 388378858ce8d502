"""Class names and ids: one class list, in one order, for all splits of a data set."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from i3d_gn.video_io.index import UNKNOWN_LABEL, VideoIndex

# A label in a list: an id, a name, or None for an unlabeled video.
Label = int | str | None


def read_label_map(path: Path) -> list[str]:
    """Class names in the order of their ids, from a text file (one per line) or an index.

    Raises:
        ValueError: For an empty list, a name that occurs twice, or the classes of Kinetics-400 in
            another order than the official one.
    """
    if path.suffix == ".parquet":
        names = list(VideoIndex.load(path).class_names)
    elif path.is_file():
        lines = path.read_text("utf-8-sig").splitlines()
        names = [line.strip().strip('"') for line in lines if line.strip()]
    else:
        raise ValueError(
            f"label map not found: {path} (a text file with one class name per line, or an index)"
        )
    if not names:
        raise ValueError(f"label map {path} is empty")
    _ids_by_key(names, source=str(path))
    _check_official_order(names, source=str(path))
    return names


# More than any data set has: a larger number is not a label but a time, a size or another id.
_MAX_CLASSES = 1_000_000

# SHA-256 of the 400 names of Kinetics-400, sorted, joined by newlines.
_KINETICS_400 = "a8dafb93a1204d4ecfa904f943ce5ee0c62ddeeb1df71aa1f96983fca17d777e"


def _check_official_order(names: Sequence[str], *, source: str) -> None:
    """Raise `ValueError` for the classes of Kinetics-400 in another order than the official one.

    Published weights and lists use the official order (Python's `sorted`): with any other, every
    accuracy would silently be measured against shuffled classes.
    """
    keys = [_key(name) for name in names]
    in_order = sorted(keys)
    if _is_kinetics_400(names) and keys != in_order:
        i = next(i for i, key in enumerate(keys) if key != in_order[i])
        raise ValueError(
            f"{source} does not have the 400 classes of Kinetics in the official order: id {i} is "
            f"{names[i]!r}, expected {in_order[i]!r}; sort the names"
        )


def _is_kinetics_400(names: Sequence[str]) -> bool:
    in_order = sorted(_key(name) for name in names)
    return hashlib.sha256("\n".join(in_order).encode()).hexdigest() == _KINETICS_400


def label_ids(
    labels: Sequence[Label],
    *,
    where: Sequence[str],
    class_names: Sequence[str] | None,
    further_names: Sequence[str] = (),
    source: str,
) -> tuple[list[str], list[int]]:
    """Return the class list, and the id of each label in it (-1 for None).

    Args:
        labels: All names or all ids.
        where: The place of each label, for messages.
        class_names: A label map: ids are positions in it, and names match it with spaces and
            underscores being equal. If None, the class list is all names in `labels` and
            `further_names`, sorted as Python sorts, which is the official order of Kinetics.
        further_names: Classes without a video.
        source: Name of the label map or list, for messages.

    Raises:
        ValueError: For a name or id that is not in the class list, and for ids mixed with names.
    """
    first_number = next((i for i, label in enumerate(labels) if isinstance(label, int)), None)
    first_name = next((i for i, label in enumerate(labels) if isinstance(label, str)), None)
    if first_number is not None and first_name is not None:
        raise ValueError(
            f"labels must be all names or all ids, but {where[first_number]} has the id "
            f"{labels[first_number]} and {where[first_name]} the name {labels[first_name]!r}"
        )
    for label, place in zip(labels, where, strict=True):
        if isinstance(label, int) and label >= _MAX_CLASSES and class_names is None:
            raise ValueError(
                f"label {label} ({place}) would mean {label + 1} classes, more than the limit of "
                f"{_MAX_CLASSES}; is it a label? Lines are `path label`"
            )
    if class_names is None:
        names = {_spelled(label) for label in labels if isinstance(label, str)}
        names |= {_spelled(name) for name in further_names}
        num_ids = 1 + max((label for label in labels if isinstance(label, int)), default=-1)
        class_names = _merge_spellings(sorted(names)) or [str(i) for i in range(num_ids)]
        if _is_kinetics_400(class_names):
            # With both spellings in use, "playing_drums" would sort after "playing guitar".
            class_names.sort(key=_key)

    ids_by_key = _ids_by_key(class_names, source=source)
    ids = []
    unknown: dict[Label, str] = {}
    for label, place in zip(labels, where, strict=True):
        if label is None:
            ids.append(UNKNOWN_LABEL)
            continue
        i = ids_by_key.get(_key(label)) if isinstance(label, str) else label
        if i is None or not UNKNOWN_LABEL <= i < len(class_names):
            unknown.setdefault(label, place)
        else:
            ids.append(i)
    if unknown:
        raise ValueError(_unknown_message(unknown, class_names, source=source))
    return list(class_names), ids


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


def _spelled(name: str) -> str:
    return name.strip().strip('"')


def _key(name: str) -> str:
    """Equal for all spellings of a name: folders have `_` where lists have a space."""
    return _spelled(name).replace("_", " ")


def _merge_spellings(names: list[str]) -> list[str]:
    """One spelling per class: of `air drumming` and `air_drumming`, the one with spaces."""
    first_spelling: dict[str, str] = {}
    for name in names:
        first_spelling.setdefault(_key(name), name)
    return list(first_spelling.values())


def _ids_by_key(class_names: Sequence[str], *, source: str) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i, name in enumerate(class_names):
        if _key(name) in ids:
            raise ValueError(
                f"{source} has the class {name!r} twice, with ids {ids[_key(name)]} and {i}; "
                "each name must occur once (spaces and underscores are equal)"
            )
        ids[_key(name)] = i
    return ids
