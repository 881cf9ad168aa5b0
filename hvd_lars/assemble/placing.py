"""Which kernel all ranks use and where momentum lives; imports config, comm and optim."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from hvd_lars.comm.base import Communicator, Reducer
from hvd_lars.comm.compressed import CompressedReducer
from hvd_lars.config import Comm, Optimizer
from hvd_lars.errors import UserError
from hvd_lars.optim import LARS, Placement, Replicated, Sharded
from hvd_lars.optim.kernels import KernelName, choose_kernel, why_not_native

_TRIALS = 5


@dataclass(frozen=True)
class Placing:
    """A placement, and why it was taken; empty where the config names it."""

    placement: Placement
    reason: str


def agree_on_kernel(wanted: KernelName, device: torch.device, comm: Communicator) -> KernelName:
    """The kernel that every rank uses: kernels differ in the last bits, and so would ranks.

    Raises:
        UserError: on every rank alike, some of them do not have the one that is wanted.
    """
    try:
        choose_kernel("auto" if wanted == "native" else wanted, device.type)
    except ValueError as error:
        raise UserError(f"optimizer.kernel: {error}") from None
    if wanted in ("fused", "eager"):
        return wanted
    reason = why_not_native(device.type)
    count = torch.tensor(float(not reason), device=device)
    comm.start_all_reduce_sum(count, "kernel").wait()
    missing = comm.size - int(count.item())
    others: list[KernelName] = ["fused", "eager"] if device.type == "cpu" else ["eager"]
    if wanted == "native" and missing:
        raise UserError(
            f"optimizer.kernel: found native, which {missing} of {comm.size} ranks cannot use "
            f"({reason or 'others than this one'}); allowed: auto, {', '.join(others)}"
        )
    return others[0] if missing else "native"


def place(
    model: nn.Module, comm: Communicator, settings: Optimizer, how: Comm, kernel: KernelName
) -> Placing:
    """The placement that the config names, or the faster one; collective."""
    bucket_bytes = int(how.bucket_mb * 2**20)
    if settings.placement == "sharded":
        if how.compression != "none":
            raise UserError(
                f"comm.compression: found {how.compression}; with optimizer.placement sharded "
                f"allowed: none"
            )
        return Placing(Sharded(model.parameters(), comm, bucket_bytes, early_norms=True), "")
    reducer: Reducer = comm
    if how.compression == "fp16":
        if comm.backend == "mpi":
            raise UserError("comm.compression: fp16 needs comm.backend horovod; MPI has no float16")
        reducer = CompressedReducer(comm)
    reason = ""
    if settings.placement == "auto":
        if comm.size == 1 or how.compression != "none":
            why = "there is one rank" if comm.size == 1 else "gradients are compressed"
            reason = f"replicated, as {why}"
        else:
            seconds = {
                kind.__name__.lower(): _step_seconds(kind, model, comm, bucket_bytes, kernel)
                for kind in (Replicated, Sharded)
            }
            faster = min(seconds, key=lambda name: seconds[name])
            told = ", ".join(f"{name} {took * 1e3:.1f} ms" for name, took in seconds.items())
            reason = f"{faster}: sums, update and gathering take {told} (median of {_TRIALS})"
            if faster == "sharded":
                sharded = Sharded(model.parameters(), comm, bucket_bytes, early_norms=True)
                return Placing(sharded, reason)
    replicated = Replicated(model.parameters(), comm, bucket_bytes, True, reducer)
    return Placing(replicated, reason)


def _step_seconds(
    kind: type[Replicated] | type[Sharded],
    model: nn.Module,
    comm: Communicator,
    bucket_bytes: int,
    kernel: KernelName,
) -> float:
    """Median seconds of a step without forward and backward; the same number on all ranks."""
    params = [nn.Parameter(torch.randn_like(p)) for p in model.parameters() if p.requires_grad]
    placement = kind(params, comm, bucket_bytes)
    optimizer = LARS(params, lr=0.0, kernel=kernel, placement=placement)
    taken = []
    for _ in range(_TRIALS + 2):
        optimizer.zero_grad()
        comm.barrier()
        started = time.perf_counter()
        optimizer.step()
        if params[0].is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    total = torch.tensor(statistics.median(taken[2:]), dtype=torch.float64)
    comm.start_all_reduce_sum(total, "step_seconds").wait()
    return total.item() / comm.size
