"""One process: every collective is the identity."""

from __future__ import annotations

from typing import NoReturn, TypeVar, final

from torch import Tensor

from hvd_lars.comm.base import (
    Pending,
    Reducer,
    check_group_size,
    check_reducible,
    check_shard,
    end_process,
    part_of,
)

T = TypeVar("T")


@final
class _Done:
    """A collective that is complete from the start."""

    def done(self) -> bool:
        """Return True."""
        return True

    def wait(self) -> None:
        """Return at once."""


@final
class LocalCommunicator:
    """A communicator of size 1, for a laptop; needs neither Horovod nor MPI."""

    rank = 0
    size = 1
    local_rank = 0
    backend = "local"

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Leave the tensor as it is."""
        check_reducible(tensor, name)
        return _Done()

    def start_reduce_scatter_sum(self, flat: Tensor, shard: Tensor, name: str) -> Pending:
        """Copy the whole."""
        check_shard(flat, shard, 1)
        shard.copy_(flat)
        return _Done()

    def start_all_gather(self, flat: Tensor, name: str) -> Pending:
        """Leave the tensor as it is."""
        part_of(flat, 0, 1)
        return _Done()

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Leave the tensor as it is."""

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """Return the value itself."""
        return value

    def barrier(self) -> None:
        """Return at once."""

    def group(self, ranks: int) -> Reducer:
        """Return this communicator itself."""
        check_group_size(ranks, 1)
        return self

    def abort(self, reason: str, code: int = 1) -> NoReturn:
        """Print the reason and end this process."""
        end_process(reason, self.rank, code)

    def close(self) -> None:
        """Do nothing."""
