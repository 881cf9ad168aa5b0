"""Output for users."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

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


@contextmanager
def progress_bar(title: str, unit: str, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal, else a line every tenth; yield a function of (done, total)."""
    if shown and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        said = TextColumn("{task.description}", markup=False)  # a title may hold a path
        columns = (said, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    last = -1 if shown else 10

    def say(done: int, total: int) -> None:
        nonlocal last
        tenth = 10 * done // total
        if tenth > last:
            last = tenth
            with suppress(OSError):
                print(f"{title}: {done:,} of {total:,} {unit}", file=sys.stderr, flush=True)

    yield say
