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

# Dtypes that MPI, Gloo and NCCL all reduce; Horovod 0.28.1 refuses bfloat16 on MPI and Gloo.
REDUCIBLE = ("float32", "float64", "int32", "int64")


class Pending(Protocol):
    """A collective in progress."""

    def done(self) -> bool:
        """Return whether ``wait`` would return at once; cheap."""
        ...

    def wait(self) -> None:
        """Return when the tensor holds the result."""
        ...


@final
class Then:
    """A collective that is followed by ``act``, and complete after it."""

    def __init__(self, pending: Pending, act: Callable[[], object]) -> None:
        self._pending, self._act = pending, act

    def done(self) -> bool:
        """Return whether the collective itself is done."""
        return self._pending.done()

    def wait(self) -> None:
        """Wait, then act."""
        self._pending.wait()
        self._act()


class Reducer(Protocol):
    """All ranks, or a group of them, that sum tensors."""

    rank: int
    size: int

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Start to sum ``tensor`` over these ranks, in place."""
        ...


class Communicator(Protocol):
    """``size`` processes that sum tensors; this one is ``rank``, or ``local_rank`` on its node.

    All methods but ``abort`` and ``close`` are collective.  A tensor must be dense and contiguous,
    on the CPU or on this rank's GPU, of a dtype in ``REDUCIBLE``; otherwise TypeError names it.
    """

    rank: int
    size: int
    local_rank: int
    backend: str

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Start to sum ``tensor`` over the ranks, in place.

        ``name`` is unique among the reductions in progress and the same on all ranks.  The tensor
        must not be touched before ``wait``.
        """
        ...

    def start_reduce_scatter_sum(self, flat: Tensor, shard: Tensor, name: str) -> Pending:
        """Start to sum ``flat`` (numel,) over the ranks, with this rank's part in ``shard``.

        ``shard`` is (numel / size,), the r-th of ``size`` equal parts on rank r.  The contents of
        ``flat`` are undefined afterwards.  Raises ValueError if the sizes do not match.
        """
        ...

    def start_all_gather(self, flat: Tensor, name: str) -> Pending:
        """Start to gather the ranks' parts of ``flat`` (numel,) on every rank, in place.

        Rank r contributes the r-th of ``size`` equal parts.  Raises ValueError if numel is not a
        multiple of size.
        """
        ...

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite ``tensor`` with rank ``root``'s; any dtype."""
        ...

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """Return rank ``root``'s ``value``, a small object, pickled between the job's own ranks."""
        ...

    def barrier(self) -> None:
        """Return when every rank has called it."""
        ...

    def group(self, ranks: int) -> Reducer:
        """Return this rank's group of ``ranks`` consecutive ranks: 0 to ranks − 1, and so on.

        The names of its reductions must differ from those in progress over all ranks.  Raises
        ValueError if ``ranks`` does not divide the size.
        """
        ...

    def abort(self, reason: str, code: int = 1) -> NoReturn:
        """Print ``reason`` unless it is empty, and end the whole job at once with ``code``."""
        ...

    def close(self) -> None:
        """Shut down in order; the last call of every rank."""
        ...


def check_reducible(tensor: Tensor, name: str, also: tuple[str, ...] = ()) -> None:
    """Raise TypeError if a backend cannot sum the tensor in place.

    ``also`` are dtypes that this backend supports in addition to ``REDUCIBLE``.
    """
    dtype, allowed = str(tensor.dtype).removeprefix("torch."), REDUCIBLE + also
    if dtype not in allowed:
        raise TypeError(f"{name}: {dtype} cannot be summed over ranks; {', '.join(allowed)} can")
    if not tensor.is_contiguous():
        raise TypeError(f"{name}: strides {tensor.stride()} are not contiguous")


def part_of(flat: Tensor, rank: int, size: int) -> Tensor:
    """Return a view of rank ``rank``'s part of a (numel,) tensor.

    Raises ValueError if the tensor cannot be divided into equal parts.
    """
    if flat.dim() != 1 or flat.numel() % size:
        raise ValueError(
            f"a collective over parts needs one dimension and a multiple of {size} elements, "
            f"got shape {tuple(flat.shape)}"
        )
    part = flat.numel() // size
    return flat[rank * part : (rank + 1) * part]


def check_shard(flat: Tensor, shard: Tensor, size: int) -> None:
    """Raise TypeError or ValueError if ``shard`` cannot hold a part of ``flat``'s sum."""
    check_reducible(flat, "reduce-scatter")
    part = part_of(flat, 0, size)
    if shard.shape != part.shape or shard.dtype != flat.dtype:
        raise ValueError(
            f"a part of {tuple(flat.shape)} {flat.dtype} over {size} ranks does not fit into "
            f"{tuple(shard.shape)} {shard.dtype}"
        )


def check_group_size(ranks: int, size: int) -> None:
    """Raise ValueError if ``size`` ranks cannot be divided into groups of ``ranks``."""
    if ranks < 1 or size % ranks:
        raise ValueError(f"groups of {ranks} ranks cannot be made of {size}")


def end_process(reason: str, rank: int, code: int) -> NoReturn:
    """Print ``reason`` and exit without finalising: the launcher then ends the other ranks.

    An orderly exit would wait in the backend's shutdown for ranks that wait for this one.
    """
    import os
    import sys

    if reason:
        print(f"rank {rank}: {reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
