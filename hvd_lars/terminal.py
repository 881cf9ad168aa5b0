"""Lines for people; imports nothing of hvd_lars."""

from __future__ import annotations

import sys
from contextlib import suppress


def tell(line: str) -> None:
    """A line on standard output.

    Training does not stop because a log's disk is full or whoever reads it has gone.
    """
    with suppress(OSError):
        print(line, flush=True)


def warn(line: str) -> None:
    """A line on standard error, as :func:`tell`."""
    with suppress(OSError):
        print(f"hvd-lars: {line}", file=sys.stderr, flush=True)
