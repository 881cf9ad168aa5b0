"""Output for users."""

from __future__ import annotations

import sys
from contextlib import suppress

from hvd_lars.errors import UserError


def tell(line: str) -> None:
    """Print a line on standard output.

    Errors are ignored: a full disk or a reader that has gone must not stop training.
    """
    with suppress(OSError):
        print(line, flush=True)


def answer(text: str) -> None:
    """Print a command's result on standard output.

    Raises:
        UserError: standard output cannot be written.
        BrokenPipeError: its reader has gone.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"standard output cannot be written: {error.strerror or error}") from None


def warn(line: str) -> None:
    """Print a line on standard error; errors are ignored as in :func:`tell`."""
    with suppress(OSError):
        print(f"hvd-lars: {line}", file=sys.stderr, flush=True)
