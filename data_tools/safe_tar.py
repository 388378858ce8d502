"""Read untrusted tar archives: truncation, decompression bombs, members that lead elsewhere."""

from __future__ import annotations

import contextlib
import gzip
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from data_tools.processes import ItemFailure

# Videos hardly compress; gzip can expand zeros by a factor of 1,000.
_MAX_EXPANSION = 100
_ALWAYS_ALLOWED_BYTES = 2**30


@contextlib.contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an archive to read its members in order, and check at the end that it was complete.

    `tarfile` takes a damaged or missing header in the middle for the end of the archive. The real
    end is a block of zeros, followed by the checksum of gzip.
    """
    open_archive = open if path.name.endswith(".tar") else gzip.open
    with open_archive(path, "rb") as stream:
        watched = _LastBlock(cast("BinaryIO", stream))
        with tarfile.open(fileobj=cast("BinaryIO", watched), mode="r:") as tar:
            yield tar
            if watched.last_block.strip(b"\0") or not watched.last_block:
                raise tarfile.ReadError("the archive is truncated or its next header is damaged")
            while stream.read(2**20):
                pass


def check_expansion(member: tarfile.TarInfo, *, archive_bytes: int) -> None:
    """Raise `ItemFailure` if the archive up to the end of `member` is a decompression bomb."""
    limit = max(_MAX_EXPANSION * archive_bytes, _ALWAYS_ALLOWED_BYTES)
    if member.offset_data + member.size > limit:
        raise ItemFailure(
            f"{archive_bytes} bytes expand to more than {limit}, the limit of {_MAX_EXPANSION} "
            f"times its size; stopped at {member.name!r}"
        )


def why_refused(member: tarfile.TarInfo, folder: Path, output: Path) -> str | None:
    """Why `member` must not be extracted to `folder`, which is below `output`; None if it may."""
    if not member.isreg():
        return "a link" if member.islnk() or member.issym() else "not a regular file"
    if member.issparse():
        return "a sparse file, which could fill the disk from a few bytes"
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
        return "its path leads outside the folder"
    if any(0xD800 <= ord(character) <= 0xDFFF for character in member.name):
        return "its name is not UTF-8"
    parent = Path(os.path.realpath(folder / path.parent))
    if not parent.is_relative_to(os.path.realpath(output)):
        return f"a link in the output folder leads outside, to {parent}"
    return None


class _LastBlock:
    """A readable file that keeps the last block read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.last_block = b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        self.last_block = self._file.read(size)
        return self.last_block
