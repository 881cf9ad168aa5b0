"""The communicator protocol.

Collectives only sum: dividing by the global batch is the caller's arithmetic.  Every rank calls
the same collectives in the same order.  After a sum all ranks hold the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar, final

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# What MPI, Gloo and NCCL all reduce; bfloat16 is refused by Horovod 0.28.1 on MPI and Gloo.
REDUCIBLE = ("float32", "float64", "int32", "int64")


class Pending(Protocol):
    """A collective under way."""

    def done(self) -> bool:
        """Whether ``wait`` would return at once; asking costs little."""
        ...

    def wait(self) -> None:
        """Return when the tensor holds the result."""
        ...


@final
class Then:
    """A collective that is complete once ``act`` has run after it."""

    def __init__(self, pending: Pending, act: Callable[[], object]) -> None:
        self._pending, self._act = pending, act

    def done(self) -> bool:
        """Whether the collective itself is."""
        return self._pending.done()

    def wait(self) -> None:
        """Wait, then act."""
        self._pending.wait()
        self._act()


class Reducer(Protocol):
    """Ranks that sum: all of them, or a group."""

    rank: int
    size: int

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Begin to sum ``tensor`` over these ranks, in place."""
        ...


class Communicator(Protocol):
    """``size`` processes that sum tensors; ``rank`` is this one, ``local_rank`` within its node.

    All methods but ``abort`` and ``close`` are collective.  A tensor is dense and contiguous, on
    the CPU or on this rank's GPU, of a dtype in ``REDUCIBLE``; TypeError names it otherwise.
    """

    rank: int
    size: int
    local_rank: int
    backend: str

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Begin to sum ``tensor`` over the ranks, in place.

        ``name`` is unique among the reductions under way and the same on all ranks.  The tensor
        is not to be touched before ``wait``.
        """
        ...

    def start_reduce_scatter_sum(self, flat: Tensor, shard: Tensor, name: str) -> Pending:
        """Begin to sum ``flat`` (numel,) over the ranks, this rank's part into ``shard``.

        ``shard`` is (numel / size,), the r-th of ``size`` equal parts on rank r.
        ``flat`` holds nothing of use afterwards.  Raises ValueError where the sizes do not fit.
        """
        ...

    def start_all_gather(self, flat: Tensor, name: str) -> Pending:
        """Begin to give every rank all parts of ``flat`` (numel,), of which it holds its own.

        In place: rank r's part is the r-th of ``size`` equal ones.  Raises ValueError where numel
        is not a multiple of size.
        """
        ...

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite ``tensor`` with that of rank ``root``; any dtype."""
        ...

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """Return ``value`` of rank ``root``; small picklable objects, between our own ranks."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...

    def group(self, ranks: int) -> Reducer:
        """This rank's group of ``ranks`` neighbours: 0 to ranks − 1, and so on.

        ``name`` of its reductions differs from those under way over all ranks.  Raises ValueError
        where ``ranks`` does not divide the size.
        """
        ...

    def abort(self, reason: str, code: int = 1) -> NoReturn:
        """Print ``reason`` where it is not empty and end the whole job with ``code``, at once."""
        ...

    def close(self) -> None:
        """Leave in good order; every rank calls it last."""
        ...


def check_reducible(tensor: Tensor, name: str, also: tuple[str, ...] = ()) -> None:
    """Raise TypeError where a backend could not sum the tensor in place.

    ``also`` are dtypes that this backend takes beside those of every backend.
    """
    dtype, allowed = str(tensor.dtype).removeprefix("torch."), REDUCIBLE + also
    if dtype not in allowed:
        raise TypeError(f"{name}: {dtype} cannot be summed over ranks; {', '.join(allowed)} can")
    if not tensor.is_contiguous():
        raise TypeError(f"{name}: strides {tensor.stride()} are not contiguous")


def part_of(flat: Tensor, rank: int, size: int) -> Tensor:
    """Rank ``rank``'s part of a (numel,) tensor, a view; ValueError where it cannot be cut."""
    if flat.dim() != 1 or flat.numel() % size:
        raise ValueError(
            f"a collective over parts takes one dimension and a multiple of {size} elements, "
            f"got shape {tuple(flat.shape)}"
        )
    part = flat.numel() // size
    return flat[rank * part : (rank + 1) * part]


def check_shard(flat: Tensor, shard: Tensor, size: int) -> None:
    """Raise TypeError or ValueError where ``shard`` cannot take a part of ``flat``'s sum."""
    check_reducible(flat, "reduce-scatter")
    part = part_of(flat, 0, size)
    if shard.shape != part.shape or shard.dtype != flat.dtype:
        raise ValueError(
            f"a part of {tuple(flat.shape)} {flat.dtype} over {size} ranks does not fit into "
            f"{tuple(shard.shape)} {shard.dtype}"
        )


def check_group_size(ranks: int, size: int) -> None:
    """Raise ValueError where ``size`` ranks cannot be cut into groups of ``ranks``."""
    if ranks < 1 or size % ranks:
        raise ValueError(f"groups of {ranks} ranks cannot be made of {size}")


def end_process(reason: str, rank: int, code: int) -> NoReturn:
    """Print ``reason`` and leave without finalising: the launcher then ends the other ranks.

    An orderly exit would wait in the backend's shutdown for ranks that wait for this one.
    """
    import os
    import sys

    if reason:
        print(f"rank {rank}: {reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
