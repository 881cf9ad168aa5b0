"""One rank acts, all ranks learn how it went; imports base and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hvd_lars.comm.base import Communicator
from hvd_lars.errors import UserError

T = TypeVar("T")


def on_root(comm: Communicator, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result, a small picklable object, on every rank.

    Raises:
        UserError: on every rank alike, where the action raised UserError or OSError on rank 0.
    """
    outcome: tuple[T | None, str | None] = (None, None)
    if comm.rank == 0:
        try:
            outcome = action(), None
        except UserError as error:
            outcome = None, str(error)
        except OSError as error:
            outcome = None, f"{error.filename or 'file system'}: {error.strerror or error}"
    result, problem = comm.broadcast_object(outcome)
    if problem is not None:
        raise UserError(problem)
    return result  # type: ignore[return-value]
