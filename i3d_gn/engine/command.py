"""How a command ends: an exit status, and errors as one line. No torch, so that help is quick."""

import sys
from collections.abc import Callable


class NonFiniteLossError(RuntimeError):
    """Training diverged."""


def run_command(command: Callable[[], int]) -> int:
    """Run a command and return its exit status.

    0 success, 1 training diverged, 2 a user error (`ValueError`) or a system error (`OSError`: disk
    full, permission denied), 130 Ctrl-C. Errors of these kinds are printed as one line on stderr.
    """
    try:
        return command()
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
