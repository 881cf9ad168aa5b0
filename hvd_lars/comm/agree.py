"""Actions of some ranks whose outcome all ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from hvd_lars.comm.base import Communicator
from hvd_lars.errors import UserError

T = TypeVar("T")


def on_root(comm: Communicator, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result, a small picklable object, on every rank.

    Raises:
        UserError: on every rank alike, if the action raised UserError or OSError on rank 0.
    """
    outcome = _attempt(action) if comm.rank == 0 else (None, None)
    result, problem = comm.broadcast_object(outcome)
    if problem is not None:
        raise UserError(problem)
    return result  # type: ignore[return-value]


def on_each_rank(comm: Communicator, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank and return its result there when all are done.

    Raises:
        UserError: on every rank alike, if an action raised UserError or OSError; the message is
            the first failing rank's.
    """
    result, problem = _attempt(action)
    failed = torch.zeros(comm.size, dtype=torch.int32)
    failed[comm.rank] = problem is not None
    comm.start_all_reduce_sum(failed, "on_each_rank").wait()
    if failed.any():
        raise UserError(str(comm.broadcast_object(problem, int(failed.argmax()))))
    return result  # type: ignore[return-value]


def on_each_node(comm: Communicator, action: Callable[[], object]) -> None:
    """As :func:`on_each_rank`, once per node, on its first rank."""
    on_each_rank(comm, lambda: action() if comm.local_rank == 0 else None)


def _attempt(action: Callable[[], T]) -> tuple[T | None, str | None]:
    """Return the action's result, or the line that says why it failed."""
    try:
        return action(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or 'file system'}: {error.strerror or error}"
