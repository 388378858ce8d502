"""Keep the memory of freed tensors in the process, instead of returning it to the kernel."""

import ctypes
import os
import platform

# From <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors; True if it will.

    By default glibc requests every block over 32 MB from the kernel, which zeroes each of its pages
    when it is first touched: some 97,000 page faults for one 32-frame clip through I3D on a CPU, an
    eighth of its processor time (benchmarks/results/cpu.md). This does nothing with other C
    libraries, or if the environment already configures glibc's allocator.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return False
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    no_separate_blocks = mallopt(_M_MMAP_MAX, 0)
    no_trimming = mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(no_separate_blocks and no_trimming)
