"""One kernel for all ranks."""

from __future__ import annotations

import torch

from hvd_lars.comm.base import Communicator
from hvd_lars.errors import UserError
from hvd_lars.optim.kernels import KernelName, choose_kernel, why_not_native


def agree_on_kernel(wanted: KernelName, device: torch.device, comm: Communicator) -> KernelName:
    """Return the kernel that all ranks use; collective for ``auto`` and ``native``.

    Kernels differ in the last bits, so mixing them would let the ranks' parameters diverge.

    Raises:
        UserError: on every rank alike: the kernel is not available on all of them.
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
