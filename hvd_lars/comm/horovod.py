"""Horovod as a communicator: MPI or Gloo on CPU, NCCL on GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, final

import torch
from torch import Tensor

from hvd_lars.comm.base import (
    Pending,
    Reducer,
    Then,
    check_group_size,
    check_reducible,
    check_shard,
    end_process,
    part_of,
)
from hvd_lars.comm.local import LocalCommunicator
from hvd_lars.comm.mpi import MpiParts, prepare_open_mpi

T = TypeVar("T")


@final
class _Handle:
    """A Horovod operation in progress; ``take`` is called with its output."""

    def __init__(
        self, hvd: Any, handle: int, take: Callable[[Tensor], object] = lambda output: None
    ) -> None:
        self._hvd, self._handle, self._take = hvd, handle, take
        self._taken = False

    def done(self) -> bool:
        """Return whether Horovod has finished it."""
        return self._taken or bool(self._hvd.poll(self._handle))

    def wait(self) -> None:
        """Return when Horovod has finished it; RuntimeError if a rank is lost."""
        self._take(self._hvd.synchronize(self._handle))
        self._taken = True  # Horovod has forgotten the handle


@final
class _Group:
    """Some of the ranks, as a Horovod process set."""

    def __init__(self, hvd: Any, process_set: Any) -> None:
        self._hvd, self._set = hvd, process_set
        self.rank: int = process_set.rank()
        self.size: int = process_set.size()

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Start to sum in place, on Horovod's own thread."""
        check_reducible(tensor, name)
        handle = self._hvd.allreduce_async_(
            tensor, name=name, op=self._hvd.Sum, process_set=self._set
        )
        return _Handle(self._hvd, handle)


@final
class HorovodCommunicator:
    """Sums over the ranks of a ``horovodrun``, ``mpirun`` or ``srun`` job.

    Tensor fusion is off unless HOROVOD_FUSION_THRESHOLD is set: Horovod packs by arrival, and the
    order of a sum depends on an element's place in the packed buffer, so two runs on three or more
    ranks would differ in their last bits.  Buckets arrive here already large and in a fixed layout.

    Args:
        groups: allow :meth:`group`; Horovod then looks for new groups in every cycle.
        mpi_parts: leave reduce-scatter and all-gather of CPU tensors to mpi4py.
    """

    backend = "horovod"

    def __init__(self, groups: bool = False, mpi_parts: bool = False) -> None:
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        # Off by default, so that a stopped rank would hang the others for ever.  Half an hour lets
        # rank 0 list or copy a data set while the others wait.
        os.environ.setdefault("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "1800")
        # Horovod looks for new tensors once a cycle, 1 ms by default: a delay of every bucket and
        # of the norms.  Over Gloo a cycle costs more than it saves.
        if os.environ.get("HOROVOD_CONTROLLER", "").lower() != "gloo":
            os.environ.setdefault("HOROVOD_CYCLE_TIME", "0.1")
        if groups:
            os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"
        prepare_open_mpi()
        # Before Horovod starts MPI: the library that starts MPI also ends it.
        self._parts = MpiParts() if mpi_parts and MpiParts.beside_others() else None
        import horovod.torch as hvd

        hvd.init()
        self._hvd = hvd
        self._groups: dict[int, list[Any]] = {}
        self.rank: int = hvd.rank()
        self.size: int = hvd.size()
        self.local_rank: int = hvd.local_rank()
        self.controller = "MPI" if hvd.mpi_enabled() else "Gloo"

    def start_all_reduce_sum(self, tensor: Tensor, name: str) -> Pending:
        """Start to sum in place, on Horovod's own thread; float16 is supported too."""
        check_reducible(tensor, name, also=("float16",))
        return _Handle(self._hvd, self._hvd.allreduce_async_(tensor, name=name, op=self._hvd.Sum))

    def start_reduce_scatter_sum(self, flat: Tensor, shard: Tensor, name: str) -> Pending:
        """Start to sum this rank's part; on Gloo, an all-reduce and a copy of the part.

        Gloo's reduce-scatter leaves the socket's send buffer at the size of its message, which
        slows every later all-reduce over that connection.
        """
        check_shard(flat, shard, self.size)
        if not flat.is_cuda and self._parts is not None:
            return self._parts.start_reduce_scatter_sum(flat, shard, name)
        if not flat.is_cuda and self.controller == "Gloo":
            part = part_of(flat, self.rank, self.size)
            return Then(self.start_all_reduce_sum(flat, name), lambda: shard.copy_(part))
        handle = self._hvd.reducescatter_async(flat, name=name, op=self._hvd.Sum)
        return _Handle(self._hvd, handle, shard.copy_)

    def start_all_gather(self, flat: Tensor, name: str) -> Pending:
        """Start to gather all parts in place."""
        part = part_of(flat, self.rank, self.size)
        if not flat.is_cuda and self._parts is not None:
            return self._parts.start_all_gather(flat, name)
        handle = self._hvd.allgather_async(part.clone(), name=name)
        return _Handle(self._hvd, handle, flat.copy_)

    def broadcast(self, tensor: Tensor, root: int = 0) -> None:
        """Overwrite with the root's bytes, so that any dtype and layout works."""
        if tensor.numel() == 0:
            return
        data = tensor.detach().contiguous()
        flat = data.view(-1).view(torch.uint8)
        self._hvd.broadcast_(flat, root_rank=root, name="broadcast")
        if data.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(data)

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """Return the root's object."""
        received: T = self._hvd.broadcast_object(value, root, name="broadcast_object")
        return received

    def barrier(self) -> None:
        """Wait for every rank."""
        self._hvd.barrier()

    def group(self, ranks: int) -> Reducer:
        """Return a process set; every rank registers those of all groups, as Horovod requires."""
        check_group_size(ranks, self.size)
        if ranks == 1:
            return LocalCommunicator()
        if ranks == self.size:
            return self
        if ranks not in self._groups:  # Horovod refuses to register the same ranks twice
            self._groups[ranks] = [
                self._hvd.add_process_set(range(first, first + ranks))
                for first in range(0, self.size, ranks)
            ]
        return _Group(self._hvd, self._groups[ranks][self.rank // ranks])

    def abort(self, reason: str, code: int = 1) -> NoReturn:
        """End this process; every launcher of Horovod jobs then ends the others."""
        end_process(reason, self.rank, code)

    def close(self) -> None:
        """Shut Horovod down on all ranks together, unless someone has."""
        if not self._hvd.is_initialized():
            return
        self._hvd.barrier()
        if self._parts is not None:
            self._parts.close()
        self._hvd.shutdown()
