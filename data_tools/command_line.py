"""Options that the commands of this folder share, and how they run as scripts."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from data_tools.processes import available_cpus
from data_tools.step import RunOptions, Shard
from i3d_gn.engine.command import run_command


def new_parser(name: str, documentation: str | None) -> argparse.ArgumentParser:
    """A parser of the command `i3d-gn NAME`; `documentation`, a module's, is its help text."""
    return argparse.ArgumentParser(
        prog=f"i3d-gn {name}",
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
        help="number of processes (default: one per core of this machine, here %(default)s)",
    )
    parser.add_argument(
        "--timeout-seconds",
        type=seconds,
        default=timeout_seconds,
        metavar="S",
        help="give up on an item that takes longer (default: %(default)g)",
    )


def add_run_options(
    parser: argparse.ArgumentParser, *, timeout_seconds: float, memory_gib: float = 4.0
) -> None:
    """Add the options of `RunOptions`, with these defaults."""
    add_process_options(parser, timeout_seconds=timeout_seconds)
    parser.add_argument(
        "--memory-gib",
        type=number_between(0.125, 1e6),
        default=memory_gib,
        metavar="GIB",
        help="give up on an item that needs more memory; Linux only (default: %(default)g)",
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
        help="address of the Ray cluster (default: the one this machine belongs to)",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="process only part I (from 0) of N, e.g. $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print how much there is to do")


def parse_options(parser: argparse.ArgumentParser, argv: list[str] | None) -> dict:
    """The parsed arguments by name; those of `add_run_options` become `run_options`."""
    options = vars(parser.parse_args(argv))
    if "engine" in options:
        memory_bytes = int(options.pop("memory_gib") * 2**30)
        names = ("engine", "ray_address", "workers", "shard", "timeout_seconds", "dry_run")
        options["run_options"] = RunOptions(
            memory_bytes=memory_bytes, **{name: options.pop(name) for name in names}
        )
    return options


def shard(text: str) -> Shard:
    """Parse `I/N`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return Shard(int(match[1]), int(match[2]))


def positive_int(text: str) -> int:
    """Parse an integer of at least 1 that FFmpeg can take, too."""
    value = int(text)
    if not 1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not between 1 and {2**31 - 1}")
    return value


def number_between(low: float, high: float) -> Callable[[str], float]:
    """Make a parser of numbers from `low` to `high`."""

    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # nan is not, either
            raise argparse.ArgumentTypeError(f"{value:g} is not between {low:g} and {high:g}")
        return value

    return number


# The system's functions that wait take no more than 2^31 ms.
seconds = number_between(0.001, 1e6)


def run_script(file: str) -> NoReturn:
    """Run the command whose script is `file`, in this folder, and exit with its status.

    The script is imported under its own name: machines of a Ray cluster cannot import functions
    of `__main__`.
    """
    module = importlib.import_module(f"data_tools.{Path(file).stem}")
    sys.exit(run_command(module.main))
