"""Files on disk: finding videos, and writing so that nothing half-written bears a final name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

VIDEO_EXTENSIONS = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
# What file systems answer that know no locks, such as Lustre where it is mounted without flock.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
# As made by atomic_output.
_UNFINISHED = re.compile(r"\.(?P<output>.+)\.[^.]+\.part")


def is_video_name(name: str) -> bool:
    """Whether a file of this name should be a video; its extension's case does not matter."""
    return os.path.splitext(name)[1].lower() in VIDEO_EXTENSIONS


def find_videos(root: Path) -> list[str]:
    """Paths of all video files under ``root``, relative to it, with ``/``, sorted.

    Links to folders are followed, each real folder once. Hidden files and folders are left out:
    they are what copying programs leave behind (``._name.mp4``) and unfinished files. Raises
    ``ValueError`` for a name that is not UTF-8, which neither a list nor an index could hold.
    """
    found: list[str] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in visited:
            subfolders.clear()
            continue
        visited.add(real_folder)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = Path(folder).relative_to(root)
        found += [
            (relative / name).as_posix()
            for name in names
            if is_video_name(name) and not name.startswith(".")
        ]
    for path in found:
        try:
            path.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"a file name below {root} is not UTF-8, rename it: {path!a}"
            ) from None
    return sorted(found)


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``, renamed to it if the block ends without error.

    The temporary name carries machine and process: when a killed run is repeated at once, its last
    child may still be writing the same file, and machines may share the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"\W", "-", socket.gethostname())
    temporary = path.with_name(f".{path.name}.{machine}-{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(root: Path, outputs: Collection[str]) -> None:
    """Remove what killed runs left of ``outputs`` (relative to ``root``).

    And of nothing else: another run may be at work on other files in the same folders.
    """
    for folder, _, names in os.walk(root):
        relative = Path(folder).relative_to(root)
        for name in names:
            match = _UNFINISHED.fullmatch(name)
            if match and (relative / match["output"]).as_posix() in outputs:
                Path(folder, name).unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` for people and programs, all of it or nothing."""
    with atomic_output(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def lock(file: BinaryIO, *, wait: bool) -> bool:
    """Take the exclusive lock of an open file, held until it is closed; whether that succeeded.

    Without ``wait`` it fails where another holds it. A file system without locks counts as free.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def file_hash(path: Path) -> str:
    """BLAKE2b of the file's bytes, 128 bits in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
