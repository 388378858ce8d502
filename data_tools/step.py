"""Run one step over its items: what is done already is left alone, the rest is shared out.

items -> those of this shard -> those that the ledger lacks -> engine -> ledger
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from data_tools.ledger import Ledger
from data_tools.processes import FailureKind, map_in_processes
from data_tools.ray_engine import map_on_ray


@dataclass(frozen=True, kw_only=True)
class Item:
    """One piece of work: ``argument`` goes to the step's function.

    ``key`` names it in the ledger, ``fingerprint`` (JSON) is all that its result depends on.
    """

    key: str
    fingerprint: Any
    argument: Any


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (from 0) of ``count``: items are dealt out by a hash of their keys."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"

    def holds(self, key: str) -> bool:
        """Whether the item is this shard's."""
        return zlib.crc32(key.encode(errors="surrogateescape")) % self.count == self.number


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and within which limits the items of a step run; see ``--help`` of any step.

    ``workers`` are processes of this machine (engine "local"); ``shard`` None is all items.
    """

    engine: Literal["local", "ray"] = "local"
    ray_address: str = "auto"
    workers: int = 1
    shard: Shard | None = None
    timeout_seconds: float = 300.0
    memory_bytes: int | None = None
    dry_run: bool = False


@dataclass(kw_only=True)
class StepResult:
    """What is known after a step.

    ``results`` are the function's values by key, ``num_kept`` of them from earlier runs;
    ``failures`` say why others have none, ``kinds`` what sort of failure. ``left`` are the keys
    that this run did not touch: those of other shards, or everything in a dry run.
    """

    results: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, FailureKind | None] = field(default_factory=dict)
    num_kept: int = 0
    left: list[str] = field(default_factory=list)


def run_step(
    function: Callable[[Any], Any],
    items: Sequence[Item],
    *,
    name: str,
    ledger_path: Path,
    execution: Execution,
    is_intact: Callable[[str, Any], bool] = lambda key, result: True,
    before: Callable[[list[str]], None] = lambda keys: None,
    unit: str = "video",
) -> StepResult:
    """Apply ``function``, in processes that may crash or hang, to each item not yet done.

    ``function`` is a top-level function (or a partial of one) from an item's argument to JSON, not
    None; it raises ``ItemFailure`` with a reason. A recorded result counts if ``is_intact(key,
    result)``, such as that its file is still there. ``before`` is called with the keys to be done.
    Failures are not recorded: they are tried again next time. ``name`` and ``unit`` are shown.
    """
    step = StepResult()
    shard = None if execution.shard is None else str(execution.shard)
    ledger = Ledger(ledger_path, shard=shard)
    with nullcontext() if execution.dry_run else ledger:
        todo = []
        for item in items:
            result = ledger.get(item.key, item.fingerprint)
            if result is not None and is_intact(item.key, result):
                step.results[item.key] = result
            elif execution.dry_run or (execution.shard and not execution.shard.holds(item.key)):
                step.left.append(item.key)
            else:
                todo.append(item)
        step.num_kept = len(step.results)
        before([item.key for item in todo])
        limits = {
            "timeout_seconds": execution.timeout_seconds,
            "memory_bytes": execution.memory_bytes,
        }
        arguments = [item.argument for item in todo]
        if execution.engine == "ray" and todo:
            outcomes = map_on_ray(function, arguments, address=execution.ray_address, **limits)
        else:
            outcomes = map_in_processes(
                function, arguments, num_workers=execution.workers, **limits
            )
        with (
            closing(outcomes),
            tqdm(
                total=len(step.results) + len(todo),
                initial=step.num_kept,
                desc=name,
                unit=unit,
                disable=None,
                leave=False,
            ) as progress,
        ):
            for i, outcome in outcomes:
                item = todo[i]
                if outcome.failure is not None:
                    step.failures[item.key] = outcome.failure
                    step.kinds[item.key] = outcome.kind
                else:
                    step.results[item.key] = outcome.value
                    ledger.record(item.key, item.fingerprint, outcome.value)
                progress.update()
    return step


def print_unfinished(step: StepResult, execution: Execution) -> None:
    """Print what a dry run would do, or what is left to other shards."""
    if execution.dry_run:
        print(f"dry run: {len(step.left)} to do, {step.num_kept} done already")
    elif step.left:
        print(
            f"shard {execution.shard}: {len(step.left)} are left to other shards; when all have "
            "run, run the step once more without --shard for the complete result"
        )
