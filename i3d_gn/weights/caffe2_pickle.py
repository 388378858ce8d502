"""Read the pickles of Detectron and video-nonlocal-net without running any code of theirs.

A pickle is a program. This reader knows seven names, with which NumPy pickles arrays and Python 2
dictionaries, and refuses every other by its name before it is called. What those names make here
are stand-ins that take numbers and nothing else: NumPy's own would let a file set their insides.
"""

import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt


class ForeignPickleError(ValueError):
    """A pickle that holds more than arrays, or is damaged."""


def read_caffe2_pickle(path: Path) -> dict[str, Any]:
    """The blobs of a `.pkl`, by name; arrays in the machine's byte order, and plain values.

    Caffe2's tools pickled `{"blobs": {...}}` or the inner dictionary, under Python 2, whose byte
    strings are read as latin-1.

    Raises:
        ForeignPickleError: truncated, no dictionary of blobs, or naming anything but arrays.
    """
    try:
        with path.open("rb") as file:
            return _blobs_of(_ArraysOnly(file, encoding="latin1").load())
    except ForeignPickleError as error:
        raise ForeignPickleError(f"weights {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ForeignPickleError(
            f"weights {path} cannot be read ({reason}); the file is damaged or not a pickle of "
            "arrays, download it again"
        ) from error


def _blobs_of(content: Any) -> dict[str, Any]:
    if isinstance(content, dict) and isinstance(content.get("blobs"), dict):
        content = content["blobs"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ForeignPickleError(
            f"a pickle of {type(content).__name__}, not of Caffe2 blobs by name"
        )
    return {
        name: value.numbers if isinstance(value, _Array) else value
        for name, value in content.items()
    }


# Python's unpickler keeps its memo in a dictionary. That of the C one is an array as long as the
# highest index in the file, so that ten bytes make it fill 32 GiB.
class _ArraysOnly(pickle._Unpickler):
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


class _Dtype:
    """Stands for `numpy.dtype(code, align, copy)` and the state that brings the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, _align: Any = False, _copy: Any = False) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"[<>=|]?[biuf][1248]", code)):
            raise ForeignPickleError(f"an array of {code!r}, refused: weights are numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def numbers(self, data: bytes | str) -> npt.NDArray[Any]:
        """The bytes as numbers, in one dimension."""
        flat = np.frombuffer(data if isinstance(data, bytes) else data.encode("latin1"), self.dtype)
        return flat.astype(self.dtype.newbyteorder("="), copy=False)


class _Array:
    """Stands for `numpy.ndarray`, which is pickled empty, and the state that fills it."""

    __slots__ = ("numbers",)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise ForeignPickleError("an array pickled in an unknown way, refused")
        self.numbers = dtype.numbers(data).reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(_kind: Any, _shape: Any, _dtype: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes | str) -> Any:
    (number,) = dtype.numbers(data)
    return number


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes under Python 3."""
    if encoding != "latin1":
        raise ForeignPickleError(f"bytes in encoding {encoding!r}, refused")
    return text.encode("latin1")


# numpy._core is numpy.core's name since NumPy 2.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}
