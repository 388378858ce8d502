"""The record of injected faults, and the table of what they did.

`soak_training.py` and `mutate_videos.py` append one line of JSON per fault to a file, so that they
can be stopped and run again to resume. This prints the tables of such files:

    python benchmarks/reliability.py RECORD.jsonl ...
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import markdown_table

OUTCOMES = ("survived", "lost", "silently wrong", "hung")


class FaultError(Exception):
    """How a fault ended other than survived: `outcome` and detail."""

    def __init__(self, outcome: str, detail: str) -> None:
        self.outcome = outcome
        super().__init__(detail)


def read_record(path: Path) -> list[dict[str, Any]]:
    """The faults recorded so far."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def append(path: Path, fault: dict[str, Any]) -> None:
    """Record a fault, with at least `kind`, `outcome` (one of OUTCOMES) and `detail`."""
    assert fault["outcome"] in OUTCOMES, fault
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fault) + "\n")


def inject(record: Path, number: int, kind: str, fault: Callable[[], None]) -> None:
    """Run a round: `fault` raises `FaultError` unless what it injects is survived; record it."""
    outcome, detail, started = "survived", "", time.monotonic()
    try:
        fault()
    except FaultError as error:
        outcome, detail = error.outcome, str(error)
    result = {"kind": kind, "outcome": outcome, "round": number, "detail": detail}
    append(record, {**result, "seconds": round(time.monotonic() - started, 1)})
    if detail:
        print(json.dumps(result), file=sys.stderr, flush=True)


def table(faults: list[dict[str, Any]]) -> str:
    """One row per kind: how many were injected, and how they ended."""
    kinds = list(dict.fromkeys(fault["kind"] for fault in faults))
    rows = []
    for kind in [*kinds, None]:
        outcomes = Counter(f["outcome"] for f in faults if kind in (None, f["kind"]))
        counts = [sum(outcomes.values()), *(outcomes[name] for name in OUTCOMES)]
        rows.append([kind or "**all**", *counts])
    return markdown_table(["fault", "injected", *OUTCOMES], rows)


def main() -> int:
    for name in sys.argv[1:]:
        faults = read_record(Path(name))
        print(f"{table(faults)}\n")
        for fault in faults:
            if fault["outcome"] != "survived":
                print(json.dumps(fault), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
