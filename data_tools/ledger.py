"""Record of the finished items of a step, so that a killed run can resume."""

from __future__ import annotations

import json
import re
import sys
import time
import zlib
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from i3d_gn.files import lock_file, print_line

_SHARD_SUFFIX = re.compile(r"\.\d+-of-\d+")


class Ledger:
    """An append-only file of JSON lines `[key, fingerprint, result, time, CRC-32 of the line]`.

    A fingerprint is all that the result depends on (size and time of the source, parameters); an
    entry with another fingerprint counts as absent. A line is written in one call after the item is
    done, so a kill loses at most the items in progress and records none that is unfinished. An
    incomplete last line is ignored, and removed before lines are appended; lines with another CRC
    are ignored, so that their items are done again.

    Each shard of a step (`shard` = "2-of-8") appends to its own file, `path` with the shard as
    suffix, and each run reads all of them: machines that share a folder never write the same file,
    but see the results of all. Of several lines for a key, the latest counts.

    To record results, enter the ledger (`with`). This waits while another run has the same file,
    and then finds the results of that run. Reading alone does not write to disk.
    """

    def __init__(self, path: Path, *, shard: str | None = None) -> None:
        self._common_path = path
        self._path = path if shard is None else path.with_name(f"{path.name}.{shard}")
        self._file: BinaryIO | None = None

    @cached_property
    def _entries(self) -> dict[str, tuple[Any, Any, float]]:
        entries: dict[str, tuple[Any, Any, float]] = {}
        for ledger in _siblings(self._common_path):
            lines = _complete_lines(ledger)
            valid = [line for line in lines if _has_valid_crc(line)]
            if len(valid) < len(lines):  # After a full disk, a power failure, a bad disk.
                print_line(
                    f"{ledger}: {len(lines) - len(valid)} damaged lines ignored; their items are "
                    "done again",
                    file=sys.stderr,
                )
            for line in valid:
                key, fingerprint, result, seconds, _ = json.loads(line)
                known = entries.get(key)
                if known is None or known[2] <= seconds:
                    entries[key] = fingerprint, result, seconds
        return entries

    def exists(self) -> bool:
        """Whether any run has recorded results here, or started to."""
        return bool(_siblings(self._common_path))

    @property
    def known_keys(self) -> set[str]:
        """The keys for which a result is recorded."""
        return set(self._entries)

    def get(self, key: str, fingerprint: Any) -> Any | None:
        """The result recorded for `key`, or None if there is none with this fingerprint."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] == fingerprint else None

    def last(self, key: str) -> tuple[Any, Any] | None:
        """The last (fingerprint, result) recorded for `key`, with any fingerprint."""
        entry = self._entries.get(key)
        return None if entry is None else entry[:2]

    def record(self, key: str, fingerprint: Any, result: Any) -> None:
        """Append a result (JSON other than None); it survives a kill after this returns."""
        assert result is not None
        assert self._file is not None, "enter the ledger before recording"
        entry = json.dumps([key, fingerprint, result, time.time()], ensure_ascii=False)
        line = entry.removesuffix("]").encode(errors="surrogateescape")
        self._file.write(b"%s, %d]\n" % (line, zlib.crc32(line)))
        self._file.flush()
        # The round trip through JSON makes tuples lists, as they are when read back.
        _, fingerprint, result, seconds = json.loads(entry)
        self._entries[key] = fingerprint, result, seconds

    def __enter__(self) -> Ledger:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            file = stack.enter_context(open(self._path, "ab"))
            if not lock_file(file, wait=False):
                print_line(f"waiting for another run to release {self._path}", file=sys.stderr)
                lock_file(file, wait=True)
            file.truncate(sum(map(len, _complete_lines(self._path))))
            stack.pop_all()
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None
        self._file.close()


def _siblings(path: Path) -> list[Path]:
    """The ledger files of all shards of a step."""
    if not path.parent.is_dir():
        return []
    return sorted(
        file
        for file in path.parent.iterdir()
        if file.name == path.name
        or (
            file.name.startswith(path.name)
            and _SHARD_SUFFIX.fullmatch(file.name.removeprefix(path.name))
        )
    )


def _has_valid_crc(line: bytes) -> bool:
    entry, _, crc = line.rpartition(b", ")
    return crc.strip() == b"%d]" % zlib.crc32(entry)


def _complete_lines(path: Path) -> list[bytes]:
    with open(path, "rb") as file:
        lines = file.readlines()
    return [line for line in lines if line.endswith(b"\n")]
