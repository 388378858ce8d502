"""Videos packed in tar shards (WebDataset's convention), on a disk or at a URL.

    root/shard-00000.tar
        00000000.json  00000000.mp4  00000001.json  00000001.mp4 ...

The index records the byte range of each video, so that videos can be read in any order. A seed
therefore gives the same clips from shards as from separate files, on a disk or over the network,
also when a run is resumed. Over HTTP or from a bucket, each video is one range request.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from i3d_gn.files import open_regular

# Attempts to read from a URL, with pauses of 0.5, 1, 2, ... seconds between them.
_ATTEMPTS = 5
_FIRST_WAIT_SECONDS = 0.5


class ShardReadError(OSError):
    """A video cannot be read from its shard; the message is one line."""


def is_url(root: str) -> bool:
    """Whether `root` is a URL for fsspec (`http://`, `s3://`, ...) and not a folder."""
    return "://" in root


def host_of(root: str) -> str | None:
    """The host (of `s3://` and the like the bucket) that a plain URL names, or `None`.

    Programs disagree on the host of URLs with user names, spaces or backslashes, and a chain of
    URLs for fsspec, such as `zip://a::http://b`, has several.
    """
    match = re.fullmatch(r"[a-z][a-z0-9+.-]*://([\w.-]+)(:\d+)?(/[^\s\\]*)?", root)
    return match[1].lower() if match and "::" not in root else None


@dataclass(frozen=True, eq=False)
class PackedVideos:
    """The location of each video of an index: shard, offset and size.

    Attributes:
        root: A folder or a URL.
        is_allowed: Whether the user named the folder, or the host of the URL.
        shards: Shard of each video, a path below `root`.
        offsets: int64 `(num_videos,)`, first byte of each video in its shard.
        sizes: int64 `(num_videos,)`, bytes of each video.
    """

    root: str
    is_allowed: bool
    shards: pa.ChunkedArray
    offsets: np.ndarray
    sizes: np.ndarray

    def check_shards(self) -> None:
        """Check that all shards exist and are long enough; does nothing for a URL.

        Raises:
            ValueError: A shard is missing or too short.
        """
        if is_url(self.root):
            return
        ends = pa.table({"shard": self.shards, "end": self.offsets + self.sizes})
        needs = ends.group_by("shard", use_threads=False).aggregate([("end", "max")])
        for need in needs.to_pylist():
            path, needed = Path(self.root, need["shard"]), need["end_max"]
            size = path.stat().st_size if path.is_file() else 0
            if size < needed:
                raise ValueError(
                    f"{path} has {size} bytes, but the index expects at least {needed}; copy the "
                    "shard again, or pack the videos again"
                )

    def read(self, i: int) -> bytes:
        """The bytes of video `i`.

        Raises:
            ShardReadError: The shard cannot be read; for a URL, after several attempts.
            ValueError: A package for this kind of URL is not installed, or the user did not name
                its host.
        """
        if not self.is_allowed:
            raise ValueError(f"{self.root} was not named as a source of videos")
        location = f"{self.root.rstrip('/')}/{self.shards[i].as_py()}"
        first, count = int(self.offsets[i]), int(self.sizes[i])
        if not is_url(self.root):
            try:
                with open_regular(location) as shard:
                    return _complete(os.pread(shard.fileno(), count, first), count)
            except OSError as error:
                raise ShardReadError(f"{location}: {error.strerror or error}") from error
        for attempt in itertools.count():
            try:
                return _complete(_read_url(location, first, count), count)
            except ImportError as error:
                raise ValueError(
                    f"{location} cannot be read without another package ({error}); "
                    "pip install 'i3d_gn[shards]', and s3fs or gcsfs for buckets"
                ) from error
            except Exception as error:  # network libraries have no common base class
                if attempt == _ATTEMPTS - 1:
                    reason = str(error) or type(error).__name__
                    raise ShardReadError(f"{location}: {reason}") from error
                time.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
        raise AssertionError


@contextlib.contextmanager
def file_in_memory(content: bytes) -> Iterator[Path]:
    """Yield a path at which `content` can be opened as a file until the block ends."""
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
    import fsspec  # noqa: PLC0415 (optional dependency)

    # fsspec keeps one connection pool per process, and makes a new one after a fork.
    filesystem, path = fsspec.core.url_to_fs(url)
    return filesystem.cat_file(path, start=first, end=first + count)


def _complete(content: bytes, count: int) -> bytes:
    """Check the size: servers without range support send whole shards."""
    if len(content) != count:
        raise ShardReadError(f"got {len(content)} bytes, expected {count}")
    return content
