"""Find the state dict of a known network in what a file contains, whatever it is nested in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from i3d_gn.norm.weight_norm import kernel_name
from i3d_gn.weights.tensor_names import NAMING_SIGNS, first_names

# Exponential moving averages of the weights, as timm and torchvision's references save them beside
# the weights. timm, too, takes them if both are there.
_AVERAGES = {"state_dict_ema", "model_ema"}
# Dictionaries around a state dict, and modules around a network (DataParallel, torch.compile,
# Lightning, mmpretrain, SimSiam, MoCo).
_USUAL = {
    *("state_dict", "model_state", "model_state_dict", "model"),
    *("module", "_orig_mod", "backbone", "encoder", "encoder_q"),
}
# Of nested dictionaries; hostile files nest them without end.
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Entry:
    """A state dict of a known network.

    Attributes:
        name: Where it is, such as `state_dict.module`: keys of dictionaries, then the prefix of its
            tensor names. Empty if the content is the state dict.
        content: The dictionary with its tensors.
        prefix: Of its tensor names there: empty, or ends in a dot.
    """

    name: str
    content: Mapping[str, Any]
    prefix: str


class UnknownNetworkError(ValueError):
    """The names of the tensors are those of no network that is known here."""


def find_entry(content: Any, wanted: str | None, origin: str) -> tuple[Entry, tuple[str, ...]]:
    """The state dict to read, and the names of the others.

    Averaged weights come first (`state_dict_ema`, `model_ema`), then the usual names.

    Args:
        content: Of a file, or a state dict.
        wanted: Name of an entry, or the first part of it, if only one entry begins with it.
        origin: Of the content, for messages.

    Raises:
        UnknownNetworkError: There is none.
        ValueError: It is not clear which one is meant.
    """
    entries = _entries(content)
    if not entries:
        raise UnknownNetworkError(_nothing_found(content, origin))
    if wanted is not None:
        chosen = [e for e in entries if f"{e.name}.".startswith(f"{wanted}.")]
    else:
        best = min(_rank(entry) for entry in entries)
        chosen = [entry for entry in entries if _rank(entry) == best]
    if len(chosen) != 1:
        names = ", ".join(entry.name or "''" for entry in entries)
        raise ValueError(
            f"weights {origin}: choose one of the entries {names}"
            if wanted is None
            else f"weights {origin}: {len(chosen)} entries match {wanted!r}; choose one of {names}"
        )
    return chosen[0], tuple(entry.name for entry in entries if entry is not chosen[0])


def _entries(content: Any) -> list[Entry]:
    """All state dicts of known networks, in breadth-first order."""
    entries: list[Entry] = []
    level: list[tuple[tuple[str, ...], Any]] = [((), content)]
    visited: set[int] = set()  # a small pickle can nest the same dictionaries billions of times
    for keys, value in level:
        if not isinstance(value, Mapping) or id(value) in visited:
            continue
        visited.add(id(value))
        prefixes = _prefixes(value)
        for prefix in prefixes:
            entries.append(Entry(".".join([*keys, *prefix.split(".")[:-1]]), value, prefix))
        if not prefixes and len(keys) < _MAX_DEPTH:
            level += [((*keys, key), inner) for key, inner in value.items() if isinstance(key, str)]
    return entries


def _prefixes(content: Mapping[Any, Any]) -> Sequence[str]:
    """Prefixes of tensor names that make them names of a known network."""
    return sorted(
        {
            plain.removesuffix(sign)
            for name, value in content.items()
            if isinstance(name, str) and isinstance(value, (Tensor, np.ndarray))
            for _, sign in NAMING_SIGNS
            if (plain := kernel_name(name)) == sign or plain.endswith(f".{sign}")
        }
    )


def _rank(entry: Entry) -> int:
    parts = set(entry.name.split(".")) - {""}
    if parts & _AVERAGES:
        return 0
    return 1 if parts <= _USUAL else 2


def _nothing_found(content: Any, origin: str) -> str:
    for key in ("state_dict", "model_state", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = (
        [str(name) for name, value in content.items() if isinstance(value, (Tensor, np.ndarray))]
        if isinstance(content, Mapping)
        else []
    )
    if not tensors:
        return f"weights {origin}: not a state dict (names -> tensors); save model.state_dict()"
    return (
        f"weights {origin}: unknown network with tensors {first_names(sorted(tensors))}; supported "
        "are ResNet-50/101 and VGG-16 of torchvision, timm, GroupNorm-reproduce, Detectron (GN), "
        "video-nonlocal-net, PySlowFast, pytorchvideo, mmaction2 and i3d_gn"
    )
