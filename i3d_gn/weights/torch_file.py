"""Read files of `torch.save` without running code from them."""

import re
from pathlib import Path
from typing import Any

import torch

from i3d_gn.engine.torch_archive import ArchiveError, check_archive, member_names

# In files of torch.save before 1.6, which are not zip archives, this pickled number comes first.
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_ZIP_MAGIC = b"PK\x03\x04"


class _Ignored:
    """Stand-in for objects that training scripts save beside weights; keeps nothing of them."""

    __slots__ = ()

    def __init__(self, *_arguments: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


# Arguments of the command line (torchvision's references, timm) and NumPy's scalars and arrays.
_IGNORED_GLOBALS = (
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "numpy.dtype",
    "numpy.ndarray",
    # Since NumPy 2, numpy.core is named numpy._core.
    *(
        f"numpy.{core}.multiarray.{function}"
        for core in ("core", "_core")
        for function in ("scalar", "_reconstruct")
    ),
)


def read_torch_file(path: Path) -> Any:
    """Read a file of `torch.save` onto the CPU.

    Tensors and plain containers are read. Arguments of the command line and NumPy's objects become
    placeholders. Any other object is refused.

    Raises:
        ValueError: The file is damaged, of another format, or contains other objects.
    """
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    if is_zip:
        _check_archive(path)
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _IGNORED_GLOBALS]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(f"weights {path} cannot be read {_reason(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse archives that torch would misread: others', damaged, and larger than their file."""
    try:
        names = member_names(path)
        if "constants.pkl" in names:
            raise ValueError(
                f"weights {path} are a TorchScript archive, which contains code; if you trust it, "
                "load it with torch.jit.load and save its state_dict()"
            )
        if "data.pkl" not in names:
            raise ValueError(
                f"weights {path} are a zip archive that torch.save did not write; unpack it and "
                "give the path of a weight file"
            )
        check_archive(path)
    except ArchiveError as error:
        raise ValueError(
            f"weights {path} cannot be read ({error}); download or copy the file again"
        ) from error


def _reason(error: Exception) -> str:
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
