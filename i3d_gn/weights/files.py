"""Weight files by format: safetensors, torch.save and Caffe2 pickles."""

import dataclasses
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from i3d_gn.files import atomic_output
from i3d_gn.weights.caffe2_pickle import read_caffe2_pickle
from i3d_gn.weights.info import WeightsInfo

# Files of torch.save before 1.6 are not zip archives; they begin with this pickled number.
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_METADATA_KEY = "i3d_gn"


def read_weight_file(path: str | os.PathLike[str]) -> tuple[Any, WeightsInfo | None]:
    """Read a weight file without running code from it.

    The format is detected from the first bytes, not from the name.

    Returns:
        The content, and the network's description if `write_safetensors` wrote the file.

    Raises:
        ValueError: The file does not exist, or cannot be read in any of the three formats.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"weights {path}: {reason}; give the path of a weight file") from error
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.lstrip()[:1] == b"<":
        raise ValueError(
            f"weights {path} cannot be read (it is a web page); download the weight file itself"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    is_pickle = head[:1] == b"\x80" and not head.startswith(_TORCH_LEGACY)
    if is_pickle or path.suffix == ".pkl":
        return read_caffe2_pickle(path), None
    try:
        return torch.load(path, map_location="cpu", weights_only=True), None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"weights {path} cannot be read {_torch_reason(error)}") from error


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], info: WeightsInfo
) -> None:
    """Write tensors, and `info` as metadata, atomically.

    Raises:
        ValueError: The file cannot be written.
    """
    path = Path(path)
    own_memory = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(dataclasses.asdict(info))}
    try:
        with atomic_output(path) as temporary:
            save_file(own_memory, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be written ({error}); give the path of a file in a writable folder"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], WeightsInfo | None]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"weights {path} cannot be read ({str(error).splitlines()[0]}); the file is damaged; "
            "download or convert it again"
        ) from error
    text = metadata.get(_METADATA_KEY)
    return tensors, None if text is None else _info_from_json(text, path)


def _info_from_json(text: str, path: Path) -> WeightsInfo:
    try:
        values = json.loads(text)
        for key in ("mean", "std"):
            values[key] = None if values[key] is None else tuple(values[key])
        return WeightsInfo(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"weights {path}: the metadata {_METADATA_KEY!r} was not written by this version of "
            f"`i3d-gn convert` ({error}); convert the original again"
        ) from error


def _torch_reason(error: Exception) -> str:
    """Why `torch.load` failed, without its advice to run code from the file."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        return (
            f"(it calls {refused[1]}, which is refused: weights are tensors in plain containers); "
            "save model.state_dict() only"
        )
    has_advice = "weights_only" in text or text.startswith("Weights only load failed")
    reason = "" if has_advice else (text.splitlines() or [""])[0]
    return (
        f"({reason or 'damaged, or of another format'}); expected a state dict saved by torch.save "
        "or safetensors, or a Caffe2 pickle (.pkl)"
    )
