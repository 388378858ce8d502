"""What commands share: options, logging, exit status. No torch, so that help is quick."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from i3d_gn.engine.host_memory import keep_freed_memory
from i3d_gn.engine.stop_signals import Stopped, StopSignals
from i3d_gn.files import print_line, printable

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run it again


class NonFiniteLossError(RuntimeError):
    """Training diverged."""


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    0 success, 1 training diverged, 2 a user error (`ValueError`) or a system error (`OSError`: disk
    full, permission denied), 75 stopped by SIGTERM, SIGUSR1 or SIGHUP, 130 stopped by Ctrl-C. All
    of these are one line on stderr.
    """
    # A rank that waits for the others does so outside of Python, where no exception can be raised:
    # it ends at once, unless training defers that.
    is_rank = os.environ.get("WORLD_SIZE", "1") != "1"
    try:
        with contextlib.nullcontext() if is_rank else StopSignals():
            return command()
    except NonFiniteLossError as error:
        print_line(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print_line(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print_line(f"{stopped}; run the same command again", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted; run the same command again", file=sys.stderr)
        return 130


def config_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """A parser of CONFIG and `key=value` overrides, for `parse_intermixed_args`."""
    parser = argparse.ArgumentParser(prog=f"i3d-gn {name}", description=description)
    parser.add_argument("config", type=Path, help=f"YAML file or name, e.g. {example}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change config values")
    return parser


def start_logging() -> None:
    """Log progress on stderr, and let the process keep the memory that large tensors free."""
    keep_freed_memory()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _PrintableFormatter(logging.Formatter):
    """The message alone; it may name files, see `printable`."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        return printable(record.getMessage())
