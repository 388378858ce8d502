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

    metadata key            meaning
    i3d_gn.format_version   "1", or "2" for packed videos; other versions are refused
    i3d_gn.root             folder that paths are relative to, itself relative to the index's folder
                            if the two share a parent, so that both can be moved together
    i3d_gn.class_names      JSON list; a label is a position in it

Other columns are allowed and ignored. An index of packed videos (format "2") has three more:
`shard` (string, a tar file below the root), `offset` and `num_bytes` (int64, which bytes of the
shard are the video). Its `path` is only a name, and its root a folder or a URL.
"""

from __future__ import annotations

import contextlib
import json
import os
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
    ]
)
_COLUMNS_LOADED = ["path", "label", "num_frames", "width", "height"]
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

    Raises:
        ValueError: `VideoIndex.load` would refuse the index: there are no records, a label is
            neither a position in `class_names` nor -1, a video has no frames or no size, or a path
            occurs twice.
    """
    path = Path(path)
    class_names = list(class_names)
    rows = list(records)
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
        },
        schema=_COLUMNS,
    ).replace_schema_metadata(
        {
            _VERSION_KEY: FORMAT_VERSION,
            _ROOT_KEY: _portable_root(Path(root), path.parent),
            _CLASS_NAMES_KEY: json.dumps(class_names, ensure_ascii=False),
        }
    )
    _check_rows(path, table, num_classes=len(class_names))
    _write_table(path, table)


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
    for name, values in zip(_PACKED_COLUMNS, (shards, offsets, sizes), strict=True):
        column = pa.array(values, pa.string() if name == "shard" else pa.int64())
        table = table.append_column(name, column)
    _write_table(path, table.replace_schema_metadata(metadata))


def _write_table(path: Path, table: pa.Table) -> None:
    with atomic_output(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


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
    """

    index_path: Path
    root: Path | str
    class_names: tuple[str, ...]
    labels: np.ndarray
    num_frames: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
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
            ValueError: The file is missing or not an index of a known format; the index is empty;
                a value is missing or has the wrong type; a label is outside the class list; a video
                has no frames or no size; a path occurs twice; or the root does not exist. The
                message is one line.
        """
        path = Path(path).absolute()
        if not path.is_file():
            raise ValueError(f"index not found: {path}; create it with `i3d-gn index`")
        table = _read_table(path)
        metadata = table.schema.metadata
        class_names = tuple(json.loads(metadata[_CLASS_NAMES_KEY]))
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
            array = table[name].cast(pa.int64()).to_numpy()
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
            VideoDecodeError: A packed video cannot be read from its shard.
        """
        if self._packed is None:
            yield self.path_of(i)
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
        with pq.ParquetFile(path, memory_map=True) as file:
            metadata = file.schema_arrow.metadata or {}
            if _VERSION_KEY not in metadata:
                raise ValueError(
                    f"{path} is a Parquet file but not a video index; create one with "
                    "`i3d-gn index`"
                )
            version = metadata[_VERSION_KEY].decode()
            if version not in {FORMAT_VERSION, PACKED_FORMAT_VERSION}:
                raise ValueError(
                    f"index {path} has format version {version}, but only versions "
                    f"{FORMAT_VERSION} and {PACKED_FORMAT_VERSION} are supported; create it again "
                    "with `i3d-gn index`"
                )
            packed = _PACKED_COLUMNS if version == PACKED_FORMAT_VERSION else []
            columns = _COLUMNS_LOADED + packed
            missing = [name for name in columns if name not in file.schema_arrow.names]
            missing += [k.decode() for k in (_ROOT_KEY, _CLASS_NAMES_KEY) if k not in metadata]
            if missing:
                raise ValueError(
                    f"index {path} lacks {', '.join(missing)}; create it again with `i3d-gn index`"
                )
            return file.read(columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a video index ({_first_line(error)}); create one with `i3d-gn index`"
        ) from error


def _check_rows(path: Path, table: pa.Table, *, num_classes: int) -> None:
    if table.num_rows == 0:
        raise ValueError(
            f"index {path} has no videos; see the report of `i3d-gn index` for the reasons"
        )
    for name in _COLUMNS_LOADED:
        column = table[name]
        if name != "path" and not pa.types.is_integer(column.type):
            raise ValueError(
                f"index {path}: column {name} has type {column.type}, must be integer; create it "
                "again with `i3d-gn index`"
            )
        if column.null_count:
            raise ValueError(
                f"index {path}: column {name} has no value in {column.null_count} rows; create it "
                "again with `i3d-gn index`"
            )
    for name in ("num_frames", "width", "height"):
        values = table[name].to_numpy()
        if values.min() < 1:
            i = int(np.argmin(values))
            raise ValueError(
                f"index {path}: {table['path'][i]} has {name} {values[i]}, must be at least 1; "
                "create it again with `i3d-gn index`, which skips videos that cannot be decoded"
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
