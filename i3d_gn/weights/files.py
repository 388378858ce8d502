"""Weight files by format: safetensors, torch.save and Caffe2 pickles."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from i3d_gn.files import atomic_output
from i3d_gn.weights.caffe2_pickle import read_caffe2_pickle
from i3d_gn.weights.info import WeightsInfo
from i3d_gn.weights.torch_file import LEGACY_MAGIC, read_torch_file

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
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"weights {path}: not a regular file; give the path of a weight file")
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
    is_pickle = head[:1] == b"\x80" and not head.startswith(LEGACY_MAGIC)
    if is_pickle or path.suffix == ".pkl":
        return read_caffe2_pickle(path), None
    return read_torch_file(path), None


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
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(own_memory, temporary, metadata=metadata)
            temporary.chmod(mode)  # safetensors makes a file that only its owner can read
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
        for key in ("mean", "std", "class_names"):
            if values.get(key) is not None:
                values[key] = tuple(values[key])
        return WeightsInfo(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"weights {path}: the metadata {_METADATA_KEY!r} was not written by this version of "
            f"`i3d-gn convert` ({error}); convert the original again"
        ) from error
