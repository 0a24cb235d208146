"""What the C library does with memory that a training step frees: keep it for the next step."""

from __future__ import annotations

import ctypes
import sys

# <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
MMAP_THRESHOLD = 32 << 20  # bytes; glibc takes no larger one
TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 32 MiB in this process instead of giving them back to the system.

    A step's tensors on a CPU are a few MiB each. Given back, they are mapped, cleared and faulted in anew at every step.
    The process stays as large as its largest step was.

    Returns:
        Whether it is so now: False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    values = {M_MMAP_THRESHOLD: MMAP_THRESHOLD, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: TOP_PAD}
    return all(mallopt(name, value) for name, value in values.items())
