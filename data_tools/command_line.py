"""What the commands of this folder share: options, errors in one line, progress."""

from __future__ import annotations

import argparse
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from tqdm import tqdm

from data_tools.processes import available_cpus
from data_tools.step import Execution, Shard

T = TypeVar("T")


def new_parser(name: str, documentation: str | None) -> argparse.ArgumentParser:
    """Make a parser that shows ``documentation``, a module's, as it is written."""
    return argparse.ArgumentParser(
        prog=name,
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_process_options(parser: argparse.ArgumentParser, *, timeout_seconds: float) -> None:
    """Add --workers and --timeout-seconds, the latter with this default."""
    parser.add_argument(
        "--workers",
        type=positive_int,
        default=available_cpus(),
        metavar="N",
        help="processes (default: the cores of this machine, here %(default)s)",
    )
    parser.add_argument(
        "--timeout-seconds",
        type=positive_float,
        default=timeout_seconds,
        metavar="S",
        help="give up an item that takes longer (default: %(default)g)",
    )


def add_execution_options(
    parser: argparse.ArgumentParser, *, timeout_seconds: float, memory_gib: float = 4.0
) -> None:
    """Add what says where and within which limits a step runs; see ``Execution``."""
    add_process_options(parser, timeout_seconds=timeout_seconds)
    parser.add_argument(
        "--memory-gib",
        type=positive_float,
        default=memory_gib,
        metavar="GIB",
        help="give up an item that needs more memory; Linux only (default: %(default)g)",
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="run in processes of this machine, or on a Ray cluster whose machines share the files "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--ray-address",
        default="auto",
        metavar="HOST:PORT",
        help="the cluster (default: the one that this machine belongs to)",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="do only part I, from 0, of N parts, for instance "
        "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only say how much there is to do, and stop"
    )


def take_execution(arguments: argparse.Namespace) -> Execution:
    """What ``add_execution_options`` asked for, which is removed from ``arguments``."""
    options = vars(arguments)
    return Execution(
        memory_bytes=int(options.pop("memory_gib") * 2**30),
        **{
            name: options.pop(name)
            for name in (
                *("engine", "ray_address", "workers", "shard"),
                *("timeout_seconds", "dry_run"),
            )
        },
    )


def shard(text: str) -> Shard:
    """Parse ``I/N``."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return Shard(int(match[1]), int(match[2]))


def positive_int(text: str) -> int:
    """Parse an option that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def positive_float(text: str) -> float:
    """Parse an option that measures something."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{value:g} is not a number above 0")
    return value


def run_command(name: str, command: Callable[[], int]) -> int:
    """Run it; the exit status.

    A ``ValueError`` is the user's to solve, an ``OSError`` the machine's (a full disk, a folder
    that cannot be written to): both are printed as one line.
    """
    try:
        return command()
    except ValueError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{name}: error: {error}; once that is mended, run it again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{name}: stopped; run it again to continue from here", file=sys.stderr)
        return 130


def run_script(file: str) -> NoReturn:
    """Run the command that the script ``file`` of this folder is, and exit.

    It is imported under its own name, since functions of ``__main__`` could not be imported by the
    machines of a cluster.
    """
    sys.exit(importlib.import_module(f"data_tools.{Path(file).stem}").main())


def with_progress(items: Iterable[T], *, total: int, done: int, description: str) -> Iterator[T]:
    """Pass ``items`` on under a progress bar, or silently where stderr is no terminal."""
    yield from tqdm(
        items, total=total, initial=done, desc=description, unit="video", disable=None, leave=False
    )
