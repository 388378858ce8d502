"""The videos of a dataset, read from and written to an index file; see `index_table`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from i3d_gn.video_io.errors import VideoDecodeError
from i3d_gn.video_io.index_table import (
    CLASS_NAMES_KEY,
    COLUMNS,
    FILE_COLUMNS,
    FORMAT_VERSION,
    PACKED_COLUMNS,
    PACKED_FORMAT_VERSION,
    ROOT_KEY,
    VERSION_KEY,
    check_rows,
    parse_class_names,
    portable_root,
    read_table,
    write_table,
)
from i3d_gn.video_io.packed import (
    PackedVideos,
    ShardReadError,
    file_in_memory,
    host_of,
    is_url,
)

# Some file systems and archives keep times to 2 seconds.
_SAME_TIME_NS = 2 * 10**9


class RootNotFoundError(ValueError):
    """The folder of an index does not exist.

    Attributes:
        problem: The message without the remedy.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}; move them there, or index them again (in Python: pass root=)")


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
        schema=COLUMNS,
    )
    check_rows(path, table, num_classes=len(class_names))
    metadata = {
        VERSION_KEY: FORMAT_VERSION.encode(),
        ROOT_KEY: portable_root(Path(root), path.parent).encode(),
        CLASS_NAMES_KEY: json.dumps(class_names, ensure_ascii=False).encode(),
    }
    write_table(path, table, metadata)


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
    metadata[VERSION_KEY] = PACKED_FORMAT_VERSION.encode()
    portable = root if is_url(root) else portable_root(Path(root), path.parent)
    metadata[ROOT_KEY] = portable.encode()
    table = table.drop_columns([name for name in FILE_COLUMNS if name in table.column_names])
    for name, values in zip(PACKED_COLUMNS, (shards, offsets, sizes), strict=True):
        column = pa.array(values, pa.string() if name == "shard" else pa.int64())
        table = table.append_column(name, column)
    write_table(path, table, metadata)


def _file_status(path: Path) -> tuple[int | None, int | None]:
    """Size in bytes and modification time of a file, `None` if there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


class VideoSource(NamedTuple):
    """A file to decode, and what its clips depend on; sizes in pixels, of the upright frame."""

    path: Path
    num_frames: int
    height: int
    width: int


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
        cls,
        path: str | os.PathLike[str],
        root: str | os.PathLike[str] | None = None,
        *,
        allowed_hosts: Collection[str] = (),
    ) -> VideoIndex:
        """Read an index.

        Args:
            path: The Parquet file.
            root: Folder of the videos, or folder or URL of the shards, instead of the one recorded
                in the index.
            allowed_hosts: Hosts (of `s3://` and the like buckets) that videos may be read from if
                the index, which may come from anywhere, says so; see `refused_root`.

        Raises:
            ValueError: The file is missing, damaged or not an index of a known format; the index is
                empty; a value is missing or has the wrong type; a label is outside the class list;
                a video has no frames or no size; a path occurs twice; or the root does not exist.
                The message is one line.
        """
        path = Path(path).absolute()
        if not path.is_file():
            raise ValueError(f"index not found: {path}; create it with `i3d-gn index`")
        table = read_table(path)
        metadata = table.schema.metadata
        class_names = parse_class_names(path, metadata[CLASS_NAMES_KEY])
        check_rows(path, table, num_classes=len(class_names))

        recorded = root is None
        hosts = {host.lower() for host in allowed_hosts}
        root = metadata[ROOT_KEY].decode() if root is None else os.fspath(root)
        is_packed = "shard" in table.column_names
        if not (is_packed and is_url(root)):
            root = Path(os.path.normpath(path.parent / root)) if recorded else Path(root).absolute()
            if not root.is_dir():
                raise RootNotFoundError(
                    f"the videos of index {path} should be in {root}, which is not a folder"
                )

        def numbers(name: str) -> np.ndarray:
            array = np.full(table.num_rows, -1)
            if name in table.column_names:
                array = table[name].fill_null(-1).to_numpy()
            array.flags.writeable = False
            return array

        packed = None
        if is_packed:
            is_allowed = not recorded or not is_url(str(root)) or host_of(str(root)) in hosts
            packed = PackedVideos(
                str(root), is_allowed, table["shard"], numbers("offset"), numbers("num_bytes")
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
        # As a root that was named, unless it was refused.
        return VideoIndex.load, (self.index_path, None if self.refused_root else self.root)

    @property
    def is_packed(self) -> bool:
        """Whether the videos are packed in tar shards."""
        return self._packed is not None

    @property
    def refused_root(self) -> str | None:
        """The URL recorded in the index, if it is not of one of `allowed_hosts`; else `None`.

        Reading a video is then an error.
        """
        return self._packed.root if self._packed and not self._packed.is_allowed else None

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

    def modified(self, *, most: int = 1000) -> list[str]:
        """Paths of videos that were modified after they were indexed, though of the same size.

        Looks at no more than `most` files, evenly spaced. None if all of these have another time
        and all have their size: then they are copies of the files that were indexed. A file of
        another size is not named here: reading it is an error.
        """
        if self._packed is not None:
            return []
        found, num_known = [], 0
        for i in np.unique(np.linspace(0, len(self) - 1, most).astype(int)).tolist():
            size, mtime_ns = _file_status(self.path_of(i))
            if size == self.num_bytes[i] and self.mtimes_ns[i] >= 0:
                num_known += 1
                if mtime_ns is None or abs(mtime_ns - self.mtimes_ns[i]) > _SAME_TIME_NS:
                    found.append(self._paths[i].as_py())
        return found if len(found) < num_known else []

    @contextlib.contextmanager
    def source_of(self, i: int) -> Iterator[VideoSource]:
        """Yield video `i` as it was indexed, to read inside the block, see `file_of`."""
        with self.file_of(i) as path:
            yield VideoSource(
                path, int(self.num_frames[i]), int(self.heights[i]), int(self.widths[i])
            )

    @cached_property
    def paths(self) -> list[str]:
        """Paths relative to the root, in index order, which identify videos in results.

        Converted to Python strings on first use.
        """
        return self._paths.to_pylist()
