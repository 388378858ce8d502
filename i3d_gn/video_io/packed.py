"""Videos that lie in tar shards (WebDataset's convention) on a disk or behind a URL.

    root/shard-00000.tar
        00000000.json  00000000.mp4  00000001.json  00000001.mp4 ...

The index knows the byte range of each video, so that videos are read one by one in any order: the
same seed gives the same clips from shards as from loose files, on a disk or over the network, and a
run resumes just the same. Over HTTP or from a bucket a video is one range request.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

# A dropped connection is tried again so often, after 0.5, 1, 2, ... seconds.
_ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 0.5


class ShardReadError(OSError):
    """A video cannot be read from its shard; the message says why, in one line."""


def is_url(root: str) -> bool:
    """Whether ``root`` is a place that fsspec knows (``http://``, ``s3://``, ...), not a folder."""
    return "://" in root


@dataclass(frozen=True, eq=False)
class PackedVideos:
    """Where each video of an index lies: shard name, first byte, number of bytes.

    ``root`` is a folder or a URL; ``offsets`` and ``sizes`` are int64 of shape (num_videos,).
    """

    root: str
    shards: pa.ChunkedArray
    offsets: np.ndarray
    sizes: np.ndarray

    def check_shards(self) -> None:
        """Raise ``ValueError`` for a shard that a folder lacks, or that is too short."""
        if is_url(self.root):
            return
        ends = pa.table({"shard": self.shards, "end": self.offsets + self.sizes})
        needs = ends.group_by("shard", use_threads=False).aggregate([("end", "max")])
        for need in needs.to_pylist():
            path, needed = Path(self.root, need["shard"]), need["end_max"]
            size = path.stat().st_size if path.is_file() else 0
            if size < needed:
                raise ValueError(
                    f"{path} has {size} bytes, the index needs {needed}; copy the shard again, or "
                    "pack the videos anew"
                )

    def read(self, i: int) -> bytes:
        """The file of video ``i``.

        Raises ``ShardReadError``, for a URL after some more attempts.
        """
        location = f"{self.root.rstrip('/')}/{self.shards[i].as_py()}"
        first, count = int(self.offsets[i]), int(self.sizes[i])
        if not is_url(self.root):
            try:
                with open(location, "rb") as shard:
                    return _complete(os.pread(shard.fileno(), count, first), count)
            except OSError as error:
                raise ShardReadError(f"{location}: {error.strerror or error}") from error
        for attempt in itertools.count():
            try:
                return _complete(_read_url(location, first, count), count)
            except ImportError as error:
                raise ValueError(
                    f"{location} needs more than is installed ({error}); "
                    "pip install 'i3d_gn[shards]', and s3fs or gcsfs for buckets"
                ) from error
            except Exception as error:  # What network libraries raise has no common type.
                if attempt == _ATTEMPTS - 1:
                    reason = str(error) or type(error).__name__
                    raise ShardReadError(f"{location}: {reason}") from error
                time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
        raise AssertionError


@contextlib.contextmanager
def file_in_memory(content: bytes) -> Iterator[Path]:
    """A path under which ``content`` can be opened as a file, and which leaves nothing behind."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("video")
        with open(descriptor, "wb", buffering=0) as file:
            _write_all(file.fileno(), content)
            yield Path(f"/proc/self/fd/{descriptor}")
        return
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield Path(file.name)


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read_url(url: str, first: int, count: int) -> bytes:
    import fsspec  # noqa: PLC0415 (many a run has no use for it)

    # fsspec keeps one connection pool for each process, and makes a new one after a fork.
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.cat_file(path, start=first, end=first + count)


def _complete(content: bytes, count: int) -> bytes:
    """A server without ranges sends the whole shard, a broken connection too little."""
    if len(content) != count:
        raise ShardReadError(f"got {len(content)} bytes of {count} asked for")
    return content
