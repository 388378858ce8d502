"""The index of a dataset: a Parquet file with one row per video.

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

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from i3d_gn.files import atomic_output
from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.packed import PackedVideos, ShardReadError, file_in_memory, is_url

FORMAT_VERSION = "1"
PACKED_FORMAT_VERSION = "2"
UNKNOWN_LABEL = -1

_VERSION_KEY = b"i3d_gn.format_version"
_ROOT_KEY = b"i3d_gn.root"
_CLASS_NAMES_KEY = b"i3d_gn.class_names"
_CRC32_KEY = b"i3d_gn.crc32"

_COLUMNS = pa.schema(
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
_FILE_COLUMNS = ["num_bytes", "mtime_ns"]
_PACKED_COLUMNS = ["shard", "offset", "num_bytes"]


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
    """One row of the index; `path` is relative to the root of the index, with `/` separators."""

    path: str
    label: int
    num_frames: int
    fps: float
    duration_seconds: float
    width: int
    height: int


def write_index(
    path: str | os.PathLike[str],
    records: Iterable[VideoRecord],
    *,
    class_names: Sequence[str],
    root: str | os.PathLike[str],
) -> None:
    """Write `records`, in this order, to the index `path`, atomically.

    The size and modification time of each file below `root` are recorded with it.

    Raises:
        ValueError: `VideoIndex.load` would refuse the index: there are no records, a label is
            neither a position in `class_names` nor -1, a video has no frames or no size, or a path
            occurs twice.
    """
    path = Path(path)
    class_names = list(class_names)
    rows = list(records)
    files = [_file_status(Path(root, row.path)) for row in rows]
    table = pa.table(
        {
            "video_id": [PurePosixPath(row.path).stem for row in rows],
            "path": [row.path for row in rows],
            "label": [row.label for row in rows],
            "class_name": [
                class_names[row.label] if 0 <= row.label < len(class_names) else None
                for row in rows
            ],
            "num_frames": [row.num_frames for row in rows],
            "fps": [row.fps for row in rows],
            "duration_seconds": [row.duration_seconds for row in rows],
            "width": [row.width for row in rows],
            "height": [row.height for row in rows],
            "num_bytes": [num_bytes for num_bytes, _ in files],
            "mtime_ns": [mtime_ns for _, mtime_ns in files],
        },
        schema=_COLUMNS,
    )
    _check_rows(path, table, num_classes=len(class_names))
    metadata = {
        _VERSION_KEY: FORMAT_VERSION.encode(),
        _ROOT_KEY: _portable_root(Path(root), path.parent).encode(),
        _CLASS_NAMES_KEY: json.dumps(class_names, ensure_ascii=False).encode(),
    }
    _write_table(path, table, metadata)


def write_packed_index(
    path: str | os.PathLike[str],
    loose: str | os.PathLike[str],
    *,
    shards: Sequence[str],
    offsets: Sequence[int],
    sizes: Sequence[int],
    root: str,
) -> None:
    """Write the index of the videos of the index `loose`, packed in tar shards, to `path`.

    Video `i` is bytes `offsets[i]` to `offsets[i] + sizes[i] - 1` of `shards[i]`, a path below
    `root`, which is a folder or a URL.
    """
    path = Path(path)
    table = pq.read_table(loose)
    metadata = dict(table.schema.metadata or {})
    metadata[_VERSION_KEY] = PACKED_FORMAT_VERSION.encode()
    portable = root if is_url(root) else _portable_root(Path(root), path.parent)
    metadata[_ROOT_KEY] = portable.encode()
    table = table.drop_columns([name for name in _FILE_COLUMNS if name in table.column_names])
    for name, values in zip(_PACKED_COLUMNS, (shards, offsets, sizes), strict=True):
        column = pa.array(values, pa.string() if name == "shard" else pa.int64())
        table = table.append_column(name, column)
    _write_table(path, table, metadata)


def _file_status(path: Path) -> tuple[int | None, int | None]:
    """Size in bytes and modification time of a file, `None` if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


def _write_table(path: Path, table: pa.Table, metadata: dict[bytes, bytes]) -> None:
    metadata = {**metadata, _CRC32_KEY: _crc32(metadata)}
    table = table.replace_schema_metadata(metadata)
    with atomic_output(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def _crc32(metadata: dict[bytes, bytes]) -> bytes:
    """Checksum of the metadata, which those of Parquet's pages do not cover."""
    content = b"\0".join(metadata[key] for key in (_VERSION_KEY, _ROOT_KEY, _CLASS_NAMES_KEY))
    return b"%08x" % zlib.crc32(content)


@dataclass(frozen=True, eq=False)
class VideoIndex:
    """An immutable index, see `load`.

    Numbers are NumPy arrays and strings stay in Arrow buffers: 240,000 videos take about 40 MB,
    without a Python object per video. Pickling stores only the path, so that a spawned worker reads
    the file again (tens of milliseconds) instead of receiving a copy.

    Attributes:
        index_path: The Parquet file, absolute.
        root: Folder of the videos, or folder or URL of the shards.
        class_names: Name of each label.
        labels: int64 `(num_videos,)`, -1 if unknown.
        num_frames: int64 `(num_videos,)`.
        heights: int64 `(num_videos,)`, of the upright frame, in pixels.
        widths: int64 `(num_videos,)`, of the upright frame, in pixels.
        num_bytes: int64 `(num_videos,)`, size of each file when indexed, -1 if unknown.
        mtimes_ns: int64 `(num_videos,)`, its modification time, -1 if unknown or packed.
    """

    index_path: Path
    root: Path | str
    class_names: tuple[str, ...]
    labels: np.ndarray
    num_frames: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    num_bytes: np.ndarray
    mtimes_ns: np.ndarray
    _paths: pa.ChunkedArray = field(repr=False)
    _packed: PackedVideos | None = field(repr=False, default=None)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None
    ) -> VideoIndex:
        """Read an index.

        Args:
            path: The Parquet file.
            root: Folder of the videos, or folder or URL of the shards, instead of the one recorded
                in the index.

        Raises:
            ValueError: The file is missing, damaged or not an index of a known format; the index is
                empty; a value is missing or has the wrong type; a label is outside the class list;
                a video has no frames or no size; a path occurs twice; or the root does not exist.
                The message is one line.
        """
        path = Path(path).absolute()
        if not path.is_file():
            raise ValueError(f"index not found: {path}; create it with `i3d-gn index`")
        table = _read_table(path)
        metadata = table.schema.metadata
        class_names = _parse_class_names(path, metadata[_CLASS_NAMES_KEY])
        _check_rows(path, table, num_classes=len(class_names))

        recorded = root is None
        root = metadata[_ROOT_KEY].decode() if root is None else os.fspath(root)
        is_packed = "shard" in table.column_names
        if not (is_packed and is_url(root)):
            root = Path(os.path.normpath(path.parent / root)) if recorded else Path(root).absolute()
            if not root.is_dir():
                raise ValueError(
                    f"the videos of index {path} should be in {root}, which is not a folder; "
                    "pass root=, or index the videos again"
                )

        def numbers(name: str) -> np.ndarray:
            array = np.full(table.num_rows, -1)
            if name in table.column_names:
                array = table[name].fill_null(-1).to_numpy()
            array.flags.writeable = False
            return array

        packed = None
        if is_packed:
            packed = PackedVideos(
                str(root), table["shard"], numbers("offset"), numbers("num_bytes")
            )
            packed.check_shards()
        return cls(
            index_path=path,
            root=root,
            class_names=class_names,
            labels=numbers("label"),
            num_frames=numbers("num_frames"),
            heights=numbers("height"),
            widths=numbers("width"),
            num_bytes=numbers("num_bytes"),
            mtimes_ns=numbers("mtime_ns"),
            _paths=table["path"],
            _packed=packed,
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __reduce__(self):
        return VideoIndex.load, (self.index_path, self.root)

    @property
    def is_packed(self) -> bool:
        """Whether the videos are packed in tar shards."""
        return self._packed is not None

    def path_of(self, i: int) -> Path:
        """Absolute path of video `i`, which must not be packed."""
        assert self._packed is None, "a packed video has no path, see file_of"
        return Path(self.root, self._paths[i].as_py())

    @contextlib.contextmanager
    def file_of(self, i: int) -> Iterator[Path]:
        """Yield a path from which to read video `i` inside the block, packed or not.

        A packed video is copied to memory; a `VideoDecodeError` raised in the block is raised again
        with the name of the video in place of the temporary path.

        Raises:
            VideoDecodeError: A packed video cannot be read from its shard, or a file does not have
                the size that it had when it was indexed.
        """
        if self._packed is None:
            path, expected = self.path_of(i), int(self.num_bytes[i])
            size, _ = _file_status(path)
            if expected >= 0 and size is not None and size != expected:
                raise VideoDecodeError(
                    path,
                    f"the file has {size} bytes, but had {expected} when it was indexed: was it "
                    "replaced? Index the videos again",
                )
            yield path
            return
        name = f"{self._packed.shards[i].as_py()}: {self._paths[i].as_py()}"
        try:
            content = self._packed.read(i)
        except ShardReadError as error:
            raise VideoDecodeError(name, str(error)) from error
        with file_in_memory(content) as path:
            try:
                yield path
            except VideoDecodeError as error:
                raise VideoDecodeError(name, error.cause, error.frame) from error

    @cached_property
    def paths(self) -> list[str]:
        """Paths relative to the root, in index order, which identify videos in results.

        Converted to Python strings on first use.
        """
        return self._paths.to_pylist()


def _read_table(path: Path) -> pa.Table:
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            metadata = file.schema_arrow.metadata or {}
            if _VERSION_KEY not in metadata:
                raise ValueError(
                    f"{path} is a Parquet file but not a video index; create one with "
                    "`i3d-gn index`"
                )
            version = metadata[_VERSION_KEY].decode(errors="replace")
            if version not in {FORMAT_VERSION, PACKED_FORMAT_VERSION}:
                raise ValueError(
                    f"index {path} has format version {version}, but only versions "
                    f"{FORMAT_VERSION} and {PACKED_FORMAT_VERSION} are supported; create it again "
                    "with `i3d-gn index`"
                )
            names = file.schema_arrow.names
            packed = _PACKED_COLUMNS if version == PACKED_FORMAT_VERSION else []
            columns = _COLUMNS_LOADED + packed
            missing = [name for name in columns if name not in names]
            missing += [k.decode() for k in (_ROOT_KEY, _CLASS_NAMES_KEY) if k not in metadata]
            if missing:
                raise ValueError(
                    f"index {path} lacks {', '.join(missing)}; create it again with `i3d-gn index`"
                )
            if metadata.get(_CRC32_KEY, _crc32(metadata)) != _crc32(metadata):
                raise ValueError(
                    f"index {path} is damaged: its metadata do not match their checksum; create it "
                    "again with `i3d-gn index`"
                )
            optional = [] if packed else [name for name in _FILE_COLUMNS if name in names]
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
        if column.null_count and (packed or name not in _FILE_COLUMNS):
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


def _parse_class_names(path: Path, text: bytes) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _BadColumnError(path, "class names must be a JSON list of strings")
    return tuple(names)


def _check_rows(path: Path, table: pa.Table, *, num_classes: int) -> None:
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
    if len(table["path"].unique()) != table.num_rows:
        paths = table["path"].value_counts()
        repeated = next(entry["values"] for entry in paths if entry["counts"].as_py() > 1)
        raise ValueError(
            f"index {path}: path {repeated} occurs more than once, but each video must count "
            "once; create it again with `i3d-gn index`, which drops duplicates"
        )


def _portable_root(root: Path, index_folder: Path) -> str:
    root, index_folder = root.absolute(), index_folder.absolute()
    # If they share only the root of the file system, they are not moved together.
    share_a_parent = root.parts[:2] == index_folder.parts[:2]
    return Path(os.path.relpath(root, index_folder) if share_a_parent else root).as_posix()


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
