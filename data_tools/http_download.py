"""Download one file over HTTP, resuming partial downloads and checking size and MD5.

name                   complete and checked
.name.download         the bytes received so far
.name.download.json    the version of the file they belong to (ETag or Last-Modified)
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import BinaryIO

from data_tools.processes import ItemFailure
from i3d_gn.files import lock_file, write_json

_BLOCK_BYTES = 2**18
_LONGEST_WAIT_SECONDS = 60.0
# Client errors that a later attempt may not get.
_TEMPORARY_STATUS = frozenset({408, 425, 429})
# Buckets answer 403 for a missing file, but also briefly when they are busy: hence a second try.
_ATTEMPTS_AFTER_CLIENT_ERROR = 2


@dataclass(frozen=True)
class Downloaded:
    """Size of the file, and how it was checked: by "md5", "size" or "nothing"."""

    num_bytes: int
    checked: str


class _AttemptFailed(Exception):  # noqa: N818
    """A failed attempt; another one may succeed."""

    def __init__(
        self, reason: str, *, status: int = 0, wait_seconds: float = 0.0, md5: str | None = None
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.wait_seconds = wait_seconds
        self.md5 = md5


def download(
    url: str,
    path: Path,
    *,
    attempts: int,
    stall_seconds: float,
    first_wait_seconds: float = 1.0,
) -> Downloaded:
    """Download `url` to `path`, which appears complete and checked or not at all.

    A connection that sends nothing for `stall_seconds` is dropped. After a failure the next attempt
    resumes from the bytes received so far, after a wait that starts at `first_wait_seconds` and
    doubles each time; progress resets the count of attempts. A file that already exists at `path`
    is treated as a partial download, so that it is checked too.

    Raises:
        ItemFailure: If all attempts fail, with the last reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked_part(path) as part:
        failed, rejected_md5 = 0, None
        furthest = part.seek(0, os.SEEK_END)
        while True:
            try:
                headers, expected_bytes = _download_rest(
                    url, path, part, stall_seconds=stall_seconds
                )
                checked = _check(part, headers, expected_bytes, rejected_md5=rejected_md5)
                break
            except (OSError, http.client.HTTPException, _AttemptFailed) as error:
                status = getattr(error, "status", 0)
                rejected_md5 = getattr(error, "md5", None) or rejected_md5
                reached = part.seek(0, os.SEEK_END)
                failed = 1 if reached > furthest else failed + 1
                furthest = max(furthest, reached)
                refused = 400 <= status < 500 and status not in _TEMPORARY_STATUS
                if failed >= (min(attempts, _ATTEMPTS_AFTER_CLIENT_ERROR) if refused else attempts):
                    tries = f"{failed} attempts" if failed > 1 else "1 attempt"
                    raise ItemFailure(f"{_reason(error)} (gave up after {tries})") from error
                backoff = first_wait_seconds * 2 ** (failed - 1) * random.uniform(0.5, 1.5)
                wait = max(backoff, getattr(error, "wait_seconds", 0.0))
                time.sleep(min(wait, _LONGEST_WAIT_SECONDS))
        num_bytes = part.seek(0, os.SEEK_END)
        os.replace(_part_path(path), path)
        _version_path(path).unlink(missing_ok=True)
    return Downloaded(num_bytes, checked)


def _download_rest(
    url: str, path: Path, part: BinaryIO, *, stall_seconds: float
) -> tuple[http.client.HTTPMessage, int | None]:
    """Append the missing bytes; return the response headers and the file's size if known."""
    have = part.seek(0, os.SEEK_END)
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if have:
        # From the last byte received, not the one after: for a complete file that is a valid range.
        request.add_header("Range", f"bytes={have - 1}-")
        version = _read_version(path)
        if version:
            request.add_header("If-Range", version)
    try:
        response = urllib.request.urlopen(request, timeout=stall_seconds)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # The file is shorter now than our part of an older version.
                part.truncate(0)
            raise _AttemptFailed(
                f"HTTP {error.code} {error.reason}",
                status=error.code if error.code != 416 else 0,
                wait_seconds=_retry_after(error.headers),
            ) from error
    with response:
        headers = response.headers
        length = _integer(headers.get("Content-Length"))
        if response.status == 206:
            total = _size_in_content_range(headers, have - 1)
            _check_version(path, part, headers)
            part.seek(have - 1)
            length = None if length is None else have - 1 + length
            if total is not None and total < have:
                part.truncate(0)
                raise _AttemptFailed(f"the file has {total} bytes, but {have} were received before")
        else:  # The whole file: the server ignores ranges, or has another version of it.
            total = length
            part.truncate(0)
            part.seek(0)
            write_json(_version_path(path), _version(headers))
        while block := response.read1(_BLOCK_BYTES):
            part.write(block)
        part.flush()
    num_bytes = part.tell()
    for expected in (length, total):
        if expected is not None and num_bytes != expected:
            raise _AttemptFailed(f"the connection closed at byte {num_bytes} of {expected}")
    return headers, total


def _check(
    part: BinaryIO,
    headers: http.client.HTTPMessage,
    expected_bytes: int | None,
    *,
    rejected_md5: str | None,
) -> str:
    """How the complete file was checked; `rejected_md5` is the MD5 of an earlier attempt."""
    size_checked = "nothing" if expected_bytes is None else "size"
    wanted, is_certain = _md5_of_headers(headers)
    part_counts = _multipart_sizes(headers, part.seek(0, os.SEEK_END))
    if wanted is None:
        for part_bytes in part_counts:
            if _multipart_etag(part, part_bytes) == headers["ETag"].strip('"'):
                return "md5"
        return size_checked
    found = _md5(part)
    if found == wanted:
        return "md5"
    if found == rejected_md5 and not is_certain:
        # The same bytes twice: the ETag is not an MD5, as in encrypted buckets.
        return size_checked
    part.truncate(0)
    raise _AttemptFailed(f"the MD5 is {found}, the server sent {wanted}", md5=found)


def _md5_of_headers(headers: http.client.HTTPMessage) -> tuple[str | None, bool]:
    """MD5 in hexadecimal, and whether the header guarantees that it is one (an ETag does not)."""
    for value in (
        *re.findall(r"md5=([\w+/=]+)", ",".join(headers.get_all("x-goog-hash", []))),
        headers.get("Content-MD5", "") if "Content-Range" not in headers else "",
    ):
        with contextlib.suppress(ValueError):
            digest = base64.b64decode(value, validate=True)
            if len(digest) == 16:
                return digest.hex(), True
    etag = re.fullmatch(r'"([0-9a-f]{32})"', headers.get("ETag", ""))
    return (etag[1] if etag else None), False


def _multipart_sizes(headers: http.client.HTTPMessage, num_bytes: int) -> list[int]:
    """Part sizes in bytes, whole MiB, that give the number of parts in the ETag of an S3 upload."""
    etag = re.fullmatch(r'"[0-9a-f]{32}-(\d+)"', headers.get("ETag", ""))
    if not etag:
        return []
    count = int(etag[1])
    smallest = max(1, num_bytes // count // 2**20)
    sizes = [mib * 2**20 for mib in (*range(smallest, smallest + 4), 8, 16, 32, 64, 128, 256, 512)]
    return [size for size in dict.fromkeys(sizes) if -(-num_bytes // size) == count]


def _multipart_etag(part: BinaryIO, part_bytes: int) -> str:
    part.seek(0)
    digests = []
    while block := part.read(part_bytes):
        digests.append(hashlib.md5(block, usedforsecurity=False).digest())
    whole = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
    return f"{whole}-{len(digests)}"


def _md5(part: BinaryIO) -> str:
    part.seek(0)
    digest = hashlib.md5(usedforsecurity=False)
    while block := part.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _size_in_content_range(headers: http.client.HTTPMessage, first: int) -> int | None:
    """File size in `Content-Range: bytes first-last/size`, None if unknown."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    if not match or int(match[1]) != first:
        raise _AttemptFailed(
            f"asked for bytes from {first}, got Content-Range {headers.get('Content-Range')!r}"
        )
    return _integer(match[2])


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None


def _retry_after(headers: Message) -> float:
    return float(_integer(headers.get("Retry-After")) or 0)


def _version(headers: http.client.HTTPMessage) -> str:
    """A value for If-Range: a strong ETag, or the time of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else headers.get("Last-Modified", "")


def _read_version(path: Path) -> str:
    try:
        return json.loads(_version_path(path).read_text("utf-8"))
    except (OSError, ValueError):
        return ""


def _check_version(path: Path, part: BinaryIO, headers: http.client.HTTPMessage) -> None:
    """Start over if the rest is of another version: some servers ignore If-Range."""
    known, now = _read_version(path), _version(headers)
    if not known:
        write_json(_version_path(path), now)
    elif now and now != known and now.startswith('"') == known.startswith('"'):
        part.truncate(0)
        raise _AttemptFailed("the file has changed on the server")


def _part_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.download")


def _version_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.download.json")


@contextlib.contextmanager
def _locked_part(path: Path) -> Iterator[BinaryIO]:
    """The bytes received so far, open to read and write, locked by this process."""
    part_path = _part_path(path)
    while True:
        if path.exists() and not part_path.exists():
            with contextlib.suppress(FileNotFoundError):
                os.replace(path, part_path)
        with open(os.open(part_path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as part:
            lock_file(part, wait=True)
            # The process that held the lock may have renamed the file to its final name.
            try:
                is_ours = os.path.samestat(os.fstat(part.fileno()), os.stat(part_path))
            except FileNotFoundError:
                is_ours = False
            if is_ours:
                yield part
                return


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError) or isinstance(getattr(error, "reason", None), TimeoutError):
        return "the server stalled"
    return str(getattr(error, "reason", None) or error or type(error).__name__)
