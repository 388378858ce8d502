"""What a step has already done, kept so that a run killed at any moment can be continued."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.files import lock

_SHARD_SUFFIX = re.compile(r"\.\d+-of-\d+")


class Ledger:
    """An append-only file of JSON lines ``[key, fingerprint, result, time]``.

    A fingerprint is whatever the result depends on (size and time of the source, parameters):
    an entry with another fingerprint counts as absent. A line is written in one go once the item
    is done, so a kill can lose the item in hand but never records one half-done; a torn last line
    is ignored, and cut off before anything is appended.

    Each shard of a step (``shard`` = "2-of-8") appends to a file of its own, ``path`` with that as
    a suffix, and every run reads all of them: machines that share a folder never write one file,
    and what any of them did counts for all. Of several lines for a key the latest wins.

    To record it must be entered (``with``), which waits until no other run has the same file, so
    that of two runs at once the second finds done what the first did. Reading alone writes nothing.
    """

    def __init__(self, path: Path, *, shard: str | None = None) -> None:
        self._common_path = path
        self._path = path if shard is None else path.with_name(f"{path.name}.{shard}")
        self._file: BinaryIO | None = None

    @cached_property
    def _entries(self) -> dict[str, tuple[Any, Any, float]]:
        entries: dict[str, tuple[Any, Any, float]] = {}
        for ledger in _siblings(self._common_path):
            for line in _complete_lines(ledger):
                try:
                    key, fingerprint, result, seconds = json.loads(line)
                except ValueError:  # A disk that was full or lost power can leave such a line.
                    continue
                known = entries.get(key)
                if known is None or known[2] <= seconds:
                    entries[key] = fingerprint, result, seconds
        return entries

    def get(self, key: str, fingerprint: Any) -> Any | None:
        """The result recorded for ``key``, or None if there is none with this fingerprint."""
        entry = self._entries.get(key)
        return entry[1] if entry is not None and entry[0] == fingerprint else None

    def last(self, key: str) -> tuple[Any, Any] | None:
        """The last (fingerprint, result) recorded for ``key``, whatever the fingerprint."""
        entry = self._entries.get(key)
        return None if entry is None else entry[:2]

    def record(self, key: str, fingerprint: Any, result: Any) -> None:
        """Append a result (JSON, not None); it survives a kill once this returns."""
        assert result is not None
        # A fingerprint read back must equal one just made, hence the round trip (tuple -> list).
        line = json.dumps([key, fingerprint, result, time.time()], ensure_ascii=False)
        assert self._file is not None, "to record, enter the ledger"
        self._file.write(line.encode(errors="surrogateescape") + b"\n")
        self._file.flush()
        _, *entry = json.loads(line)
        self._entries[key] = tuple(entry)

    def __enter__(self) -> Ledger:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            file = stack.enter_context(open(self._path, "ab"))
            if not lock(file, wait=False):
                print(
                    f"waiting for the end of another run, which has {self._path}", file=sys.stderr
                )
                lock(file, wait=True)
            file.truncate(sum(map(len, _complete_lines(self._path))))
            stack.pop_all()
        self._file = file
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None
        self._file.close()


def _siblings(path: Path) -> list[Path]:
    """The ledger files of one step, of all its shards."""
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


def _complete_lines(path: Path) -> list[bytes]:
    with open(path, "rb") as file:
        lines = file.readlines()
    return [line for line in lines if line.endswith(b"\n")]


def file_fingerprint(path: Path) -> list[int]:
    """Size in bytes and modification time in ns: what tells a file from its earlier self."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]
