"""Lines for people."""

from __future__ import annotations

import sys
from contextlib import suppress

from hvd_lars.errors import UserError


def tell(line: str) -> None:
    """A line on standard output.

    Training does not stop because a log's disk is full or whoever reads it has gone.
    """
    with suppress(OSError):
        print(line, flush=True)


def answer(text: str) -> None:
    """What a command is for, on standard output.

    Raises:
        UserError: it cannot be written.
        BrokenPipeError: its reader has gone.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output cannot be written: {error.strerror or error}") from None


def warn(line: str) -> None:
    """A line on standard error, as :func:`tell`."""
    with suppress(OSError):
        print(f"hvd-lars: {line}", file=sys.stderr, flush=True)
