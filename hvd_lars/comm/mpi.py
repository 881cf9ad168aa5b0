"""MPI through mpi4py as a communicator, for sites without Horovod; imports base."""

from __future__ import annotations

import sys
from typing import Any, NoReturn, TypeVar, final

import torch
from torch import Tensor

from hvd_lars.comm.base import (
    Pending,
    Reducer,
    check_divisible,
    check_group_size,
    check_reducible,
)

T = TypeVar("T")


@final
class _Request:
    """A non-blocking MPI operation on ``host``, the CPU copy of ``tensor`` or its own memory."""

    def __init__(self, request: Any, tensor: Tensor, host: Tensor) -> None:
        self._request, self._tensor, self._host = request, tensor, host

    def wait(self) -> None:
        """Return when MPI has finished it and the tensor holds the result."""
        self._request.Wait()
        if self._host.data_ptr() != self._tensor.data_ptr():
            self._tensor.copy_(self._host)


@final
class _Group:
    """Some of the ranks, on an MPI communicator of their own."""

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi, self._comm = mpi, comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Begin to sum in place; MPI matches the reductions by order, not by name."""
        check_reducible(tensor, name)
        host = tensor.detach().cpu()
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, host.numpy(), op=self._mpi.SUM)
        return _Request(request, tensor.detach(), host)


@final
class MpiCommunicator:
    """Sums over ``MPI.COMM_WORLD``; GPU tensors are staged through host memory."""

    backend = "mpi"

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self._all = _Group(MPI, self._comm)
        node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank: int = node.Get_rank()
        node.Free()

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Begin to sum in place; MPI matches the reductions by order, not by name."""
        return self._all.start_all_reduce_sum(tensor, name)

    def reduce_scatter_sum(self, flat: Tensor) -> Tensor:
        """Reduce_scatter_block into a new tensor."""
        check_reducible(flat, "reduce_scatter_sum")
        check_divisible(flat, self.size)
        host = flat.detach().cpu()
        part = torch.empty(flat.numel() // self.size, dtype=flat.dtype)
        self._comm.Reduce_scatter_block(host.numpy(), part.numpy(), op=self._mpi.SUM)
        return part.to(flat.device)

    def all_gather(self, shard: Tensor) -> Tensor:
        """Allgather into a new tensor."""
        host = shard.detach().cpu().contiguous()
        whole = torch.empty(host.numel() * self.size, dtype=host.dtype)
        self._comm.Allgather(_bytes(host), _bytes(whole))
        return whole.to(shard.device)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite with the root's bytes, so that every dtype and layout is served."""
        host = tensor.detach().cpu().contiguous()
        self._comm.Bcast(_bytes(host), root=root)
        if host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(host)

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """Return the root's object."""
        received: T = self._comm.bcast(value, root=root)
        return received

    def barrier(self) -> None:
        """Wait for every rank."""
        self._comm.Barrier()

    def group(self, ranks: int) -> Reducer:
        """Split by rank // ranks."""
        check_group_size(ranks, self.size)
        return _Group(self._mpi, self._comm.Split(self.rank // ranks, self.rank))

    def abort(self, reason: str, code: int = 1) -> NoReturn:
        """End every rank through MPI_Abort."""
        if reason:
            print(f"rank {self.rank}: {reason}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.COMM_WORLD.Abort(code)
        raise SystemExit(code)  # MPI_Abort does not return

    def close(self) -> None:
        """Leave together; mpi4py finalises MPI at exit."""
        self._comm.Barrier()


def _bytes(host: Tensor) -> Any:
    """Memory of a contiguous CPU tensor as a uint8 array, whatever its dtype."""
    return host.view(-1).view(torch.uint8).numpy()
