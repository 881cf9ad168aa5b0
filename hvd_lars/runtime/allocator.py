"""How the C library treats freed memory."""

from __future__ import annotations

import ctypes
import os
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let this process keep what a step frees for the next one, in place of asking anew.

    glibc returns large pieces to the system at once, and every step then pays a page fault for
    each 4 KiB of activations and gradients: a sixth of a CPU step of AlexNet at 224×224
    (docs/performance.md).  Left as it is where somebody has set a ``MALLOC_`` variable, or where
    the C library has no such switch.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt: Any = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
