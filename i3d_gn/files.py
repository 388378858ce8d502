"""Files that appear complete or not at all, and their hashes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TextIO

# What file systems without locks answer, such as Lustre mounted without `flock`.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
# A disk that is full, over its quota, or read-only: no other file can be written either.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
# The temporary names of `atomic_output`.
_UNFINISHED = re.compile(r"\.(?P<output>.+)\.[^.]+\.part")


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` if the block succeeds.

    Readers see the old file or the new one, never half of one. The temporary name carries host and
    process id: a killed command may be repeated while its last child still writes the same file,
    and hosts may share the folder.

    Raises:
        OSError: With the path, if the disk is full; some libraries raise it without.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"\W", "-", socket.gethostname())
    temporary = path.with_name(f".{_short_name(path.name)}.{host}-{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in NO_SPACE or error.filename == str(path):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_output(
    path: Path,
    inputs: Iterable[str | os.PathLike[str]] = (),
    *,
    suffixes: tuple[str, ...] = (),
) -> None:
    """Refuse, before work is done, an output that cannot be written or would replace an input.

    Args:
        path: The file to write.
        inputs: Files that are read; those that do not exist are ignored.
        suffixes: Of the formats that can be written; empty for any name.

    Raises:
        ValueError: `path` has none of the suffixes, is a folder or one of `inputs`, or its folder
            cannot be written.
    """
    if suffixes and path.suffix not in suffixes:
        raise ValueError(f"{path}: its name must end in {', '.join(suffixes)}")
    folder = path.absolute().parent
    while not os.path.lexists(folder):
        folder = folder.parent
    reason = "it is a folder" if path.is_dir() else None
    if reason is None:
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"{folder} is not a writable folder ({error.strerror or error})"
    if reason is None and path.exists() and any(_is_same_file(path, x) for x in inputs):
        reason = "it is also an input"
    if reason is not None:
        raise ValueError(f"{path} cannot be written: {reason}; give the path of another file")


def _is_same_file(path: Path, other: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # no such file, or not a path
        return False


def remove_unfinished(root: Path, outputs: Iterable[str]) -> None:
    """Remove the temporary files that killed processes left of `outputs`, paths below `root`.

    Temporary files of other outputs stay: another process may be writing them.
    """
    paths = map(PurePosixPath, outputs)
    wanted = {path.with_name(_short_name(path.name)).as_posix() for path in paths}
    for folder, _, names in os.walk(root) if wanted else ():
        relative = Path(folder).relative_to(root)
        for name in names:
            match = _UNFINISHED.fullmatch(name)
            if match and (relative / match["output"]).as_posix() in wanted:
                Path(folder, name).unlink(missing_ok=True)


def _short_name(name: str) -> str:
    """`name`, or a hash of it if a temporary name made of it could exceed 255 bytes."""
    encoded = name.encode(errors="surrogateescape")
    return name if len(encoded) <= 160 else hashlib.sha256(encoded).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_output(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def printable(text: str) -> str:
    """`text` with control characters escaped: file names may hold escape codes of terminals."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_line(text: str, *, file: TextIO | None = None) -> None:
    """Print a line that may hold file names, on stdout by default; see `printable`."""
    print(printable(text), file=file)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is not a regular file, before it is opened: a pipe can block, a device never end.

    Raises:
        OSError: `path` is a directory, pipe, socket or device, or there is no such file.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", os.fspath(path))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; see `check_regular`."""
    check_regular(path)
    return open(path, "rb")


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the bytes of a regular file, in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def lock_file(file: BinaryIO | int, *, wait: bool) -> bool:
    """Take the exclusive lock of an open file, held until it is closed; return whether it was free.

    With `wait`, wait until it is. The lock ends with the process that
    holds it. On a file system without locks every file counts as free.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
