"""Class names and ids: one list, in one order, for all splits of a data set."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path

from i3d_gn.video_io.index import UNKNOWN_LABEL, VideoIndex

# A label as a source has it: an id, a name, or None where it has none.
Label = int | str | None


def read_label_map(path: Path) -> list[str]:
    """Class names in the order of their ids: from a text file, one a line, or from an index.

    Raises ``ValueError`` for an empty list or a name that occurs twice.
    """
    if path.suffix == ".parquet":
        names = list(VideoIndex.load(path).class_names)
    elif path.is_file():
        lines = path.read_text("utf-8-sig").splitlines()
        names = [line.strip().strip('"') for line in lines if line.strip()]
    else:
        raise ValueError(f"there is no label map {path}: a text file with one class name a line")
    if not names:
        raise ValueError(f"label map {path} names no class")
    _ids_by_key(names, source=str(path))
    _check_official_order(names, source=str(path))
    return names


# Of numbered ones, far beyond any data set: numbers larger than that are times, sizes or ids.
_MOST_CLASSES = 1_000_000

# SHA-256 of the 400 names of Kinetics-400, sorted, joined by newlines.
_KINETICS_400 = "a8dafb93a1204d4ecfa904f943ce5ee0c62ddeeb1df71aa1f96983fca17d777e"


def _check_official_order(names: Sequence[str], *, source: str) -> None:
    """Raise ``ValueError`` for the classes of Kinetics-400 in another order than the official one.

    Published weights and lists number them in that order, Python's ``sorted``: with another one
    every accuracy would silently be that of a shuffled class list.
    """
    keys = [_key(name) for name in names]
    in_order = sorted(keys)
    if _are_kinetics_400(names) and keys != in_order:
        i = next(i for i, key in enumerate(keys) if key != in_order[i])
        raise ValueError(
            f"{source} has the 400 classes of Kinetics in another than the official order: id {i} "
            f"is {names[i]!r}, should be {in_order[i]!r}; sort the names"
        )


def _are_kinetics_400(names: Sequence[str]) -> bool:
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
    """The class list and the id of each label in it.

    With ``class_names`` (a label map) ids are positions in it, spaces and underscores being equal.
    Without, the class list is every name that occurs in ``labels`` or ``further_names``, in
    Python's order, which is the official order of Kinetics. Labels that are numbers are ids
    already. ``where`` says for each label where it stands.

    Raises ``ValueError`` for a name or id that the class list lacks, and for numbers mixed with
    names.
    """
    first_number = next((i for i, label in enumerate(labels) if isinstance(label, int)), None)
    first_name = next((i for i, label in enumerate(labels) if isinstance(label, str)), None)
    if first_number is not None and first_name is not None:
        raise ValueError(
            f"labels must be all names or all numbers, but {where[first_number]} has the number "
            f"{labels[first_number]} and {where[first_name]} the name {labels[first_name]!r}"
        )
    for label, place in zip(labels, where, strict=True):
        if isinstance(label, int) and label >= _MOST_CLASSES and class_names is None:
            raise ValueError(
                f"label {label} ({place}) would make {label + 1} classes, {_MOST_CLASSES} are the "
                "most; is it a label at all? Lines are `path label`"
            )
    if class_names is None:
        names = {_spelled(label) for label in labels if isinstance(label, str)}
        names |= {_spelled(name) for name in further_names}
        num_ids = 1 + max((label for label in labels if isinstance(label, int)), default=-1)
        class_names = _merge_spellings(sorted(names)) or [str(i) for i in range(num_ids)]
        if _are_kinetics_400(class_names):
            # "playing_drums" sorts behind "playing guitar", should folders be spelled both ways.
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
        problem = f"label {label} ({place}) is no id of the {len(class_names)} classes of {source}"
    else:
        nearest = difflib.get_close_matches(str(label), class_names, n=1)
        hint = f", nearest is {nearest[0]!r}" if nearest else ""
        problem = f"class {label!r} ({place}) is not among the {len(class_names)} of {source}{hint}"
    others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
    return (
        f"{problem}{others}; train and val must share one class list: give the same complete "
        "--label-map to both (a file with one name a line in the order of the ids, or the index "
        "of the split that has all classes)"
    )


def _spelled(name: str) -> str:
    return name.strip().strip('"')


def _key(name: str) -> str:
    """What is equal in two spellings of one name: folders have ``_`` where lists have a space."""
    return _spelled(name).replace("_", " ")


def _merge_spellings(names: list[str]) -> list[str]:
    """One spelling per class; of ``air drumming`` and ``air_drumming`` the one with spaces."""
    first_spelling: dict[str, str] = {}
    for name in names:
        first_spelling.setdefault(_key(name), name)
    return list(first_spelling.values())


def _ids_by_key(class_names: Sequence[str], *, source: str) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i, name in enumerate(class_names):
        if _key(name) in ids:
            raise ValueError(
                f"{source} names the class {name!r} twice, with ids {ids[_key(name)]} and {i}; "
                "each name must occur once (a space and an underscore count as the same)"
            )
        ids[_key(name)] = i
    return ids
