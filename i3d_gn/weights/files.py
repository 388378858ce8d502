"""What a weight file holds, whatever its format: safetensors, torch.save or a Caffe2 pickle."""

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

# torch.save before 1.6 begins with this pickled number, not with a zip archive.
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_METADATA_KEY = "i3d_gn"


def read_weight_file(path: str | os.PathLike[str]) -> tuple[Any, WeightsInfo | None]:
    """The content of a weight file, and what `write_safetensors` wrote of its network, if it did.

    The format is told by the first bytes, not by the name. Nothing in a file is run.

    Raises:
        ValueError: no such file, or it cannot be read as any of the three.
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
            f"weights {path} cannot be read (a web page, not weights); download the file itself"
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
        ValueError: the file cannot be written there.
    """
    path = Path(path)
    own_memory = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(dataclasses.asdict(info))}
    try:
        with atomic_output(path) as temporary:
            save_file(own_memory, temporary, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be written ({error}); give the path of a file in a folder that can be "
            "written to"
        ) from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], WeightsInfo | None]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"weights {path} cannot be read ({str(error).splitlines()[0]}); the file is damaged, "
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
            f"weights {path}: metadata {_METADATA_KEY!r} is not what `i3d-gn convert` writes "
            f"({error}); convert the original again"
        ) from error


def _torch_reason(error: Exception) -> str:
    """Why `torch.load` refused a file; its own message advises to run what the file says."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        return (
            f"(it calls {refused[1]}, refused: weights are tensors and plain containers); save "
            "model.state_dict() and nothing else"
        )
    by_restriction = text.startswith("Weights only load failed")
    reason = "" if by_restriction else (text.splitlines() or [""])[0]
    return (
        f"({reason or 'damaged or of another format'}); expected a state dict saved by torch.save "
        "or safetensors, or a Caffe2 pickle (.pkl)"
    )
