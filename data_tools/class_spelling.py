"""Spellings and order of class names."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

# SHA-256 of the 400 names of Kinetics-400, sorted, joined by newlines.
_KINETICS_400 = "a8dafb93a1204d4ecfa904f943ce5ee0c62ddeeb1df71aa1f96983fca17d777e"


def spelled(name: str) -> str:
    """`name` without surrounding blanks and quotes, in the normal form NFC (macOS uses NFD)."""
    return unicodedata.normalize("NFC", name.strip().strip('"'))


def class_key(name: str) -> str:
    """Equal for all spellings of a name: folders have `_` where lists have a space."""
    return spelled(name).replace("_", " ")


def ids_by_class(class_names: Sequence[str], *, source: str) -> dict[str, int]:
    """The id of each class by its `class_key`.

    Raises:
        ValueError: If two names are spellings of one class.
    """
    ids: dict[str, int] = {}
    for i, name in enumerate(class_names):
        if class_key(name) in ids:
            raise ValueError(
                f"{source} has the class {name!r} twice, with ids {ids[class_key(name)]} and {i}; "
                "each name must occur once (spaces and underscores are equal)"
            )
        ids[class_key(name)] = i
    return ids


def check_official_order(names: Sequence[str], *, source: str) -> None:
    """Raise `ValueError` for the classes of Kinetics-400 in another order than the official one.

    Published weights and lists use the official order (Python's `sorted`): with any other, every
    accuracy would silently be measured against shuffled classes.
    """
    keys = [class_key(name) for name in names]
    in_order = sorted(keys)
    if is_kinetics_400(names) and keys != in_order:
        i = next(i for i, key in enumerate(keys) if key != in_order[i])
        raise ValueError(
            f"{source} does not have the 400 classes of Kinetics in the official order: id {i} is "
            f"{names[i]!r}, expected {in_order[i]!r}; sort the names"
        )


def is_kinetics_400(names: Sequence[str]) -> bool:
    """Whether `names` are the classes of Kinetics-400, in any order and spelling."""
    in_order = sorted(class_key(name) for name in names)
    return hashlib.sha256("\n".join(in_order).encode()).hexdigest() == _KINETICS_400
