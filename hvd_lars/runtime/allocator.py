"""The C library's treatment of freed memory."""

from __future__ import annotations

import ctypes
import os
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Keep memory freed by one step for the next, instead of returning it to the system.

    glibc returns large blocks at once, and every step then pays a page fault for each 4 KiB of
    activations and gradients: a sixth of a CPU step of AlexNet at 224×224 (docs/performance.md).
    Does nothing if a ``MALLOC_`` variable is set, or if the C library has no such switch.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt: Any = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
