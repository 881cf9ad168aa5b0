"""Build the placement that a config names."""

from __future__ import annotations

from torch import nn

from hvd_lars.comm.base import Communicator, Reducer
from hvd_lars.comm.compressed import CompressedReducer
from hvd_lars.config.schema import Comm
from hvd_lars.errors import UserError
from hvd_lars.optim import Placement, Replicated, Sharded
from hvd_lars.optimizers import OptimizerSettings
from hvd_lars.runtime.stopwatch import Stopwatch


def place(
    model: nn.Module,
    comm: Communicator,
    settings: OptimizerSettings,
    how: Comm,
    watch: Stopwatch | None = None,
) -> Placement:
    """Place the model's parameters, which keep each rank's own values.

    Args:
        model: the model, on its device.
        comm: the ranks.
        settings: of the optimizer; ``placement`` is not ``auto``.
        how: of the communication; ``bucket_mb`` is not ``auto``.
        watch: times the waiting for other ranks.

    Raises:
        UserError: on every rank alike: the placement or backend does not support compression.
    """
    assert how.bucket_mb != "auto"
    bucket_bytes = int(how.bucket_mb * 2**20)
    if settings.placement == "sharded":
        if how.compression != "none":
            raise UserError(
                f"comm.compression: found {how.compression}; must be none with "
                f"optimizer.placement sharded"
            )
        return Sharded(
            model.parameters(), comm, bucket_bytes, early_norms=True, root=None, watch=watch
        )
    reducer: Reducer = comm
    if how.compression == "fp16":
        if comm.backend == "mpi":
            raise UserError("comm.compression: fp16 needs comm.backend horovod; MPI has no float16")
        if comm.size > 1:
            reducer = CompressedReducer(comm)
    return Replicated(
        model.parameters(),
        comm,
        bucket_bytes,
        early_norms=True,
        gradients_through=reducer,
        root=None,
        watch=watch,
    )
