"""Exclusive locks of files, which end with the process that holds them."""

from __future__ import annotations

import errno
import fcntl
from typing import BinaryIO

# What file systems without locks answer, such as Lustre mounted without `flock`.
_NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})


def lock_file(file: BinaryIO, *, wait: bool) -> bool:
    """Take the exclusive lock of an open file, held until it is closed; whether that succeeded.

    Without `wait` it fails if another process holds the lock. On a file system without locks it
    always succeeds.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
