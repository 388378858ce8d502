"""Read the pickles of Detectron and video-nonlocal-net without running code from them.

A pickle is a program that may call any function. This reader allows only the globals that NumPy
uses to pickle arrays, and refuses every other by name before it is called. The allowed globals map
to stand-ins that accept numbers only: NumPy's own would let a file set the internal state of dtypes
and arrays.
"""

import pickle
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt


class Caffe2PickleError(ValueError):
    """The pickle is damaged, or contains more than arrays."""


def read_caffe2_pickle(path: Path) -> dict[str, Any]:
    """Read the blobs of a `.pkl` by name: arrays, in native byte order, and plain values.

    Caffe2 pickled `{"blobs": {...}}` or the inner dictionary with Python 2, whose byte strings are
    read as latin-1.

    Raises:
        Caffe2PickleError: The file is truncated, has no dictionary of blobs, or refers to
            anything but arrays.
    """
    try:
        with path.open("rb") as file:
            return _blobs(_ArraysOnly(file, encoding="latin1").load())
    except Caffe2PickleError as error:
        raise Caffe2PickleError(f"weights {path}: {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise Caffe2PickleError(
            f"weights {path} cannot be read ({reason}); the file is damaged or not a pickle of "
            "arrays; download it again"
        ) from error


def _blobs(content: Any) -> dict[str, Any]:
    if isinstance(content, dict) and isinstance(content.get("blobs"), dict):
        content = content["blobs"]
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise Caffe2PickleError(
            f"the pickle contains a {type(content).__name__}, not a dictionary of Caffe2 blobs"
        )
    return {
        name: value.numbers if isinstance(value, _Array) else value
        for name, value in content.items()
    }


# The pure-Python unpickler keeps its memo in a dictionary. The C one uses an array as long as the
# highest memo index in the file, so that a file of ten bytes can make it allocate 32 GiB.
class _ArraysOnly(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = _ALLOWED.get((module, name))
        if known is None:
            raise Caffe2PickleError(
                f"the pickle calls {module}.{name}, which is refused: weights are arrays only"
            )
        return known

    def persistent_load(self, pid: Any) -> NoReturn:
        raise Caffe2PickleError(
            "the pickle refers to objects outside it, which is refused: weights are arrays only"
        )


class _Dtype:
    """Stand-in for `numpy.dtype(code, align, copy)`, whose state contains the byte order."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, _align: Any = False, _copy: Any = False) -> None:
        if not (isinstance(code, str) and re.fullmatch(r"[<>=|]?[biuf][1248]", code)):
            raise Caffe2PickleError(
                f"the pickle has an array of {code!r}, which is refused: weights are numbers"
            )
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])

    def numbers(self, data: bytes | str) -> npt.NDArray[Any]:
        """The bytes as a 1-D array in native byte order."""
        flat = np.frombuffer(data if isinstance(data, bytes) else data.encode("latin1"), self.dtype)
        return flat.astype(self.dtype.newbyteorder("="), copy=False)


class _Array:
    """Stand-in for `numpy.ndarray`, which is pickled empty and filled by its state."""

    __slots__ = ("numbers",)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise Caffe2PickleError("an array is pickled in an unknown way, which is refused")
        self.numbers = dtype.numbers(data).reshape(shape, order="F" if is_fortran else "C")


def _reconstruct(_kind: Any, _shape: Any, _dtype: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, data: bytes | str) -> Any:
    (number,) = dtype.numbers(data)
    return number


def _encode(text: str, encoding: str) -> bytes:
    """Stand-in for `_codecs.encode`, with which Python 3 writes bytes in protocol 2."""
    if encoding != "latin1":
        raise Caffe2PickleError(f"the pickle has bytes in encoding {encoding!r}, which is refused")
    return text.encode("latin1")


# Since NumPy 2, numpy.core is named numpy._core.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
}
