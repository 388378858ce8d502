"""Run one step of data preparation over its items, skipping those already done.

items -> items of this shard -> items not in the ledger -> local processes or Ray -> ledger
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
    """One unit of work.

    Attributes:
        key: Its name in the ledger.
        fingerprint: All that its result depends on, as JSON.
        argument: Passed to the function of the step.
    """

    key: str
    fingerprint: Any
    argument: Any


@dataclass(frozen=True)
class Shard:
    """Part `number` (from 0) of `count`; items are assigned by a hash of their keys."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"

    def holds(self, key: str) -> bool:
        """Whether the item with this key is in this shard."""
        return zlib.crc32(key.encode(errors="surrogateescape")) % self.count == self.number


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the items of a step run, and their limits; see `--help` of any step.

    Attributes:
        engine: "local" for processes of this machine, "ray" for a Ray cluster.
        ray_address: Address of the Ray cluster.
        workers: Number of local processes.
        shard: Process only the items of this shard; None for all.
        timeout_seconds: Time limit per item.
        memory_bytes: Memory limit per process (Linux), None for no limit.
        dry_run: Process no items.
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
    """State of the items after a step, by key.

    Attributes:
        results: Return values of the function.
        failures: Reasons why other items have no result.
        kinds: Kinds of these failures.
        num_kept: How many of the results are from earlier runs.
        left: Items without result that this run did not process: those of other shards, or all in
            a dry run.
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
    run_options: RunOptions,
    is_intact: Callable[[str, Any], bool] = lambda key, result: True,
    before: Callable[[list[str]], None] = lambda keys: None,
    unit: str = "video",
) -> StepResult:
    """Apply `function` to each item not yet done, in processes that may crash or hang.

    Failures are not recorded, so that the next run tries these items again.

    Args:
        function: A top-level function, or a `functools.partial` of one, from the argument of an
            item to JSON other than None. Raises `ItemFailure` with a reason.
        items: All items, done or not.
        name: Shown beside the progress bar.
        ledger_path: Where results are recorded.
        run_options: Where the items run, and their limits.
        is_intact: `is_intact(key, result)` tells whether a recorded result is still valid, e.g.
            its output file still exists.
        before: Called with the keys of the items to do, before the first of them.
        unit: What an item is, shown beside the progress bar.

    Raises:
        OSError: The disk is full or read-only; what is done is in the ledger.
    """
    step = StepResult()
    shard = None if run_options.shard is None else str(run_options.shard)
    ledger = Ledger(ledger_path, shard=shard)
    with nullcontext() if run_options.dry_run else ledger:
        todo = []
        for item in items:
            result = ledger.get(item.key, item.fingerprint)
            if result is not None and is_intact(item.key, result):
                step.results[item.key] = result
            elif run_options.dry_run or (
                run_options.shard and not run_options.shard.holds(item.key)
            ):
                step.left.append(item.key)
            else:
                todo.append(item)
        step.num_kept = len(step.results)
        before([item.key for item in todo])
        limits = {
            "timeout_seconds": run_options.timeout_seconds,
            "memory_bytes": run_options.memory_bytes,
        }
        arguments = [item.argument for item in todo]
        if run_options.engine == "ray" and todo:
            outcomes = map_on_ray(function, arguments, address=run_options.ray_address, **limits)
        else:
            outcomes = map_in_processes(
                function, arguments, num_workers=run_options.workers, **limits
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
                if outcome.kind == "disk":  # it would be the same for all items that are left
                    raise OSError(f"{outcome.failure}; free some space, and run the command again")
                if outcome.failure is not None:
                    step.failures[item.key] = outcome.failure
                    step.kinds[item.key] = outcome.kind
                else:
                    step.results[item.key] = outcome.value
                    ledger.record(item.key, item.fingerprint, outcome.value)
                progress.update()
    return step


def print_unfinished(step: StepResult, run_options: RunOptions) -> None:
    """Print how much a dry run found to do, or what is left to other shards."""
    if run_options.dry_run:
        print(f"dry run: {len(step.left)} to do, {step.num_kept} already done")
    elif step.left:
        print(
            f"shard {run_options.shard}: {len(step.left)} left to other shards; when all shards "
            "have run, run the command again without --shard for the complete result"
        )
