"""The Parquet file of an index: its columns and metadata, written and read with all checks.

The metadata of the schema hold what applies to all videos.

    column            type      meaning
    video_id          string    file name without folder and extension
    path              string    relative to the root, POSIX separators (absolute if outside it)
    label             int64     class id, -1 if unknown
    class_name        string    null if unknown
    num_frames        int64     frames of a full decode, in presentation order
    fps               float64
    duration_seconds  float64
    width, height     int32     of the upright frame, in pixels
    num_bytes         int64     size of the file when it was indexed, null if unknown
    mtime_ns          int64     its modification time, null if unknown

    metadata key            meaning
    i3d_gn.format_version   "1", or "2" for packed videos; other versions are refused
    i3d_gn.root             folder that paths are relative to, itself relative to the index's folder
                            if the two share a parent, so that both can be moved together
    i3d_gn.class_names      JSON list; a label is a position in it
    i3d_gn.crc32            checksum of the other three; pages of the file have checksums as well

The last two columns and the checksums may be missing, as in older indexes. Other columns are
allowed and ignored. An index of packed videos (format "2") has `shard` (string, a tar file below
the root) and `offset` (int64) instead of `mtime_ns`: bytes `offset` to `offset + num_bytes - 1` of
the shard are the video. Its `path` is only a name, and its root a folder or a URL.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from i3d_gn.files import atomic_output

FORMAT_VERSION = "1"
PACKED_FORMAT_VERSION = "2"
UNKNOWN_LABEL = -1

VERSION_KEY = b"i3d_gn.format_version"
ROOT_KEY = b"i3d_gn.root"
CLASS_NAMES_KEY = b"i3d_gn.class_names"
_CRC32_KEY = b"i3d_gn.crc32"

COLUMNS = pa.schema(
    [
        ("video_id", pa.string()),
        ("path", pa.string()),
        ("label", pa.int64()),
        ("class_name", pa.string()),
        ("num_frames", pa.int64()),
        ("fps", pa.float64()),
        ("duration_seconds", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)
_COLUMNS_LOADED = ["path", "label", "num_frames", "width", "height"]
FILE_COLUMNS = ["num_bytes", "mtime_ns"]
PACKED_COLUMNS = ["shard", "offset", "num_bytes"]


def write_table(path: Path, table: pa.Table, metadata: dict[bytes, bytes]) -> None:
    """Write the file atomically, with checksums of its pages and its metadata."""
    metadata = {**metadata, _CRC32_KEY: _crc32(metadata)}
    table = table.replace_schema_metadata(metadata)
    with atomic_output(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def _crc32(metadata: dict[bytes, bytes]) -> bytes:
    """Checksum of the metadata, which those of Parquet's pages do not cover."""
    content = b"\0".join(metadata[key] for key in (VERSION_KEY, ROOT_KEY, CLASS_NAMES_KEY))
    return b"%08x" % zlib.crc32(content)


def read_table(path: Path) -> pa.Table:
    """Read the columns that are used, as strings and int64; the schema has the metadata.

    Raises:
        ValueError: The file is damaged or not an index of a known format, a value is missing or a
            column has the wrong type.
    """
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            if VERSION_KEY not in metadata:
                raise ValueError(
                    f"{path} is a Parquet file but not a video index; create one with "
                    "`i3d-gn index`"
                )
            version = metadata[VERSION_KEY].decode(errors="replace")
            if version not in {FORMAT_VERSION, PACKED_FORMAT_VERSION}:
                raise ValueError(
                    f"index {path} has format version {version}, but only versions "
                    f"{FORMAT_VERSION} and {PACKED_FORMAT_VERSION} are supported; create it again "
                    "with `i3d-gn index`"
                )
            names = file.schema_arrow.names
            packed = PACKED_COLUMNS if version == PACKED_FORMAT_VERSION else []
            columns = _COLUMNS_LOADED + packed
            missing = [name for name in columns if name not in names]
            missing += [k.decode() for k in (ROOT_KEY, CLASS_NAMES_KEY) if k not in metadata]
            if missing:
                raise ValueError(
                    f"index {path} lacks {', '.join(missing)}; create it again with `i3d-gn index`"
                )
            if metadata.get(_CRC32_KEY, _crc32(metadata)) != _crc32(metadata):
                raise ValueError(
                    f"index {path} is damaged: its metadata do not match their checksum; create it "
                    "again with `i3d-gn index`"
                )
            optional = [] if packed else [name for name in FILE_COLUMNS if name in names]
            table = file.read(columns=columns + optional)
            # Its own metadata are another copy in the file, which was not checked.
            table = table.replace_schema_metadata(metadata)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a video index or damaged ({_first_line(error)}); create one with "
            "`i3d-gn index`"
        ) from error
    for number, name in enumerate(table.column_names):
        column = table[name]
        is_text = name in ("path", "shard")
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if is_text and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise _BadColumnError(path, f"column {name} has type {column.type}, must be string")
        if not is_text and not pa.types.is_integer(kind):
            raise _BadColumnError(path, f"column {name} has type {column.type}, must be integer")
        if column.null_count and (packed or name not in FILE_COLUMNS):
            raise _BadColumnError(path, f"column {name} has no value in {column.null_count} rows")
        try:
            column = column.cast(pa.string() if is_text else pa.int64())
        except pa.ArrowInvalid as error:
            raise _BadColumnError(path, f"column {name}: {_first_line(error)}") from error
        table = table.set_column(number, name, column)
    return table


class _BadColumnError(ValueError):
    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"index {path}: {problem}; create it again with `i3d-gn index`")


def parse_class_names(path: Path, text: bytes) -> tuple[str, ...]:
    """Parse the class names of the metadata of the index `path`, which errors name."""
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _BadColumnError(path, "class names must be a JSON list of strings")
    return tuple(names)


def check_rows(path: Path, table: pa.Table, *, num_classes: int) -> None:
    """Check the rows of the index `path`.

    Raises:
        ValueError: There are none, a number or label is out of range, or a path occurs twice.
    """
    if table.num_rows == 0:
        raise ValueError(
            f"index {path} has no videos; see the report of `i3d-gn index` for the reasons"
        )
    minimum = {"num_frames": 1, "width": 1, "height": 1}
    if "shard" in table.column_names:
        minimum |= {"offset": 0, "num_bytes": 1}
    for name, least in minimum.items():
        values = table[name].to_numpy()
        if values.min() < least:
            i = int(np.argmin(values))
            raise ValueError(
                f"index {path}: {table['path'][i]} has {name} {values[i]}, must be at least "
                f"{least}; create it again with `i3d-gn index`, which skips videos that cannot be "
                "decoded"
            )
    labels = table["label"].to_numpy()
    outside = (labels < UNKNOWN_LABEL) | (labels >= num_classes)
    if outside.any():
        i = int(np.argmax(outside))
        raise ValueError(
            f"index {path}: {table['path'][i]} has label {labels[i]}, but labels must be below "
            f"the number of classes, {num_classes} (or -1, unknown); index the videos again with "
            "the complete class list (--label-map)"
        )
    if "shard" in table.column_names and any(
        "::" in n for n in table["shard"].unique().to_pylist()
    ):
        raise ValueError(
            f"index {path}: a shard has :: in its name, with which a URL would name another host; "
            "pack the videos again"
        )
    if len(table["path"].unique()) != table.num_rows:
        paths = table["path"].value_counts()
        repeated = next(entry["values"] for entry in paths if entry["counts"].as_py() > 1)
        raise ValueError(
            f"index {path}: path {repeated} occurs more than once, but each video must count "
            "once; create it again with `i3d-gn index`, which drops duplicates"
        )


def portable_root(root: Path, index_folder: Path) -> str:
    """`root` as an index in `index_folder` records it: relative to it if both can move together."""
    root, index_folder = root.absolute(), index_folder.absolute()
    # If they share only the root of the file system, they are not moved together.
    share_a_parent = root.parts[:2] == index_folder.parts[:2]
    return Path(os.path.relpath(root, index_folder) if share_a_parent else root).as_posix()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
