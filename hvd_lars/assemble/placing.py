"""The placement that a config names."""

from __future__ import annotations

from torch import nn

from hvd_lars.comm.base import Communicator, Reducer
from hvd_lars.comm.compressed import CompressedReducer
from hvd_lars.config.optimizer import Optimizer
from hvd_lars.config.schema import Comm
from hvd_lars.errors import UserError
from hvd_lars.optim import Placement, Replicated, Sharded


def place(model: nn.Module, comm: Communicator, settings: Optimizer, how: Comm) -> Placement:
    """A placement of the model's parameters; bucket size and placement are no longer ``auto``.

    Raises:
        UserError: on every rank alike, compression is asked for where it cannot be had.
    """
    assert how.bucket_mb != "auto"
    bucket_bytes = int(how.bucket_mb * 2**20)
    if settings.placement == "sharded":
        if how.compression != "none":
            raise UserError(
                f"comm.compression: found {how.compression}; with optimizer.placement sharded "
                f"allowed: none"
            )
        return Sharded(model.parameters(), comm, bucket_bytes, early_norms=True)
    reducer: Reducer = comm
    if how.compression == "fp16":
        if comm.backend == "mpi":
            raise UserError("comm.compression: fp16 needs comm.backend horovod; MPI has no float16")
        if comm.size > 1:
            reducer = CompressedReducer(comm)
    return Replicated(model.parameters(), comm, bucket_bytes, True, reducer)
