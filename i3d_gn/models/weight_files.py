"""What a weight file holds, whatever its format: safetensors, torch.save or a Caffe2 pickle."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from i3d_gn.models.caffe2_pickle import read_caffe2_pickle

# torch.save before 1.6 begins with this pickled number, not with a zip archive.
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def read_weight_file(path: str | os.PathLike[str]) -> tuple[Any, dict[str, str]]:
    """The content of a weight file, and the metadata of safetensors (else empty).

    The format is told by the first bytes, not by the name. Nothing in a file is run.

    Raises:
        ValueError: no such file, or it cannot be read as any of the three.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file")
    with path.open("rb") as file:
        head = file.read(16)
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path)
    is_pickle = head[:1] == b"\x80" and not head.startswith(_TORCH_LEGACY)
    if is_pickle or path.suffix == ".pkl":
        return read_caffe2_pickle(path), {}
    try:
        return torch.load(path, map_location="cpu", weights_only=True), {}
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"weights {path} cannot be read ({reason}); expected a state dict saved by torch.save "
            "or safetensors, or a Caffe2 pickle (.pkl)"
        ) from error


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write tensors and metadata, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    own_memory = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(own_memory, temporary, metadata={"format": "pt", **metadata})
    os.replace(temporary, path)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"weights {path} cannot be read ({str(error).splitlines()[0]}); the file is damaged, "
            "download or convert it again"
        ) from error
