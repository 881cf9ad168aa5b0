"""The arithmetic of a step over many layers, in several ways that agree; imports nothing above.

``native`` is this package's own code (C++ on CPU), ``fused`` torch's fused SGD with LARS folded
into its coefficients, ``eager`` plain torch.  :func:`choose_kernel` is the one place that decides.
"""

from __future__ import annotations

import functools
from typing import Literal

from hvd_lars.optim.kernels.block import Block, Kernel
from hvd_lars.optim.kernels.eager import EagerKernel
from hvd_lars.optim.kernels.fused import FusedKernel
from hvd_lars.optim.kernels.native import NativeKernel, why_not_native

KernelName = Literal["auto", "native", "fused", "eager"]

__all__ = ["Block", "Kernel", "KernelName", "choose_kernel", "why_not_native"]


@functools.cache
def choose_kernel(wanted: KernelName, device: str) -> Kernel:
    """The kernel of that name for a type of device (``"cpu"``, ``"cuda"``).

    ``auto`` takes the fastest that this machine has, as benchmarks/lars_step.py measures them:
    native, else fused, else eager on CPU; eager elsewhere.

    Raises:
        ValueError: there is no such kernel for the device; says why and which there are.
    """
    if device != "cpu":
        if wanted in ("native", "fused"):
            raise ValueError(
                f"kernel {wanted} runs on CPU; for parameters on {device} allowed: auto, eager"
            )
        return EagerKernel(on_host=False)
    reason = why_not_native()
    if wanted == "native" and reason:
        raise ValueError(f"kernel native: {reason}; allowed here: auto, fused, eager")
    if wanted == "native" or (wanted == "auto" and not reason):
        return NativeKernel()
    return EagerKernel(on_host=True) if wanted == "eager" else FusedKernel()
