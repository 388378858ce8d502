"""Read the pickles of Detectron and video-nonlocal-net without running any code of theirs.

A pickle is a program. This reader knows six names, all of them NumPy's ways of rebuilding arrays,
and refuses every other by its name before it is called.
"""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

_NUMBER_KINDS = "biuf"


class ForeignPickleError(ValueError):
    """A pickle that holds more than arrays, or is damaged."""


def read_caffe2_pickle(path: Path) -> dict[str, Any]:
    """The blobs of a `.pkl`, by name; arrays and plain values.

    Caffe2's tools pickled `{"blobs": {...}}` or the inner dictionary, under Python 2, whose byte
    strings are read as latin-1.

    Raises:
        ForeignPickleError: truncated, no dictionary of blobs, or naming anything but arrays.
    """
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file, encoding="latin1").load()
    except ForeignPickleError as error:
        raise ForeignPickleError(f"weights {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ForeignPickleError(
            f"weights {path} cannot be read ({reason}); the file is damaged or not a pickle of "
            "arrays, download it again"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("blobs"), dict):
        content = content["blobs"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ForeignPickleError(
            f"weights {path}: a pickle of {type(content).__name__}, not of Caffe2 blobs by name"
        )
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind not in _NUMBER_KINDS:
            raise ForeignPickleError(f"weights {path}: {name} is an array of {value.dtype}")
    return content


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _ALLOWED.get((module, name))
        if known is None:
            raise ForeignPickleError(
                f"a pickle that calls {module}.{name}, refused: weights are arrays and nothing else"
            )
        return known

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ForeignPickleError(
            "a pickle with references to objects outside it, refused: weights are arrays"
        )


def _empty_array(kind: Any, shape: Any, _dtype: Any) -> npt.NDArray[Any]:
    """NumPy pickles an array as an empty one and its state; the state brings shape and bytes."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise ForeignPickleError("an array pickled in an unknown way, refused")
    return np.ndarray.__new__(np.ndarray, (0,), np.int8)


def _scalar(dtype: np.dtype[Any], data: bytes | str) -> Any:
    if dtype.kind not in _NUMBER_KINDS:
        raise ForeignPickleError(f"a scalar of {dtype}, refused: weights are numbers")
    return np.frombuffer(data if isinstance(data, bytes) else data.encode("latin1"), dtype)[0]


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes under Python 3."""
    if encoding != "latin1":
        raise ForeignPickleError(f"bytes in encoding {encoding!r}, refused")
    return text.encode("latin1")


# numpy._core is numpy.core's name since NumPy 2.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}
