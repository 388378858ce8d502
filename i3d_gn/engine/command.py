"""How an entry point meets its user: progress on stderr, mistakes as one line."""

import logging
import sys
from collections.abc import Callable

from i3d_gn.engine.host_memory import keep_freed_memory
from i3d_gn.engine.trainer import NonFiniteLossError


def run_command(main: Callable[[], int]) -> int:
    """Run an entry point and return its exit status.

    0 success, 1 training diverged, 2 something the user can mend (a `ValueError`, or
    an `OSError` as of a full disk or a folder that cannot be written), 130 Ctrl-C.
    """
    keep_freed_memory()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return main()
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
