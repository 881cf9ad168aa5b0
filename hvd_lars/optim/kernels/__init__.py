"""The arithmetic of a step over many layers, in several ways that agree.

``native`` is this package's own code (C++ on CPU, Triton on a GPU), ``fused`` torch's fused SGD
with LARS folded into its coefficients, ``eager`` plain torch.  :func:`choose_kernel` is the one
place that decides.
"""

from __future__ import annotations

import functools
from typing import Literal

from hvd_lars.optim.kernels.block import Block, Kernel
from hvd_lars.optim.kernels.eager import EagerKernel
from hvd_lars.optim.kernels.fused import FusedKernel
from hvd_lars.optim.kernels.gpu import GpuKernel, why_not_gpu
from hvd_lars.optim.kernels.native import NativeKernel, why_not_loaded

KernelName = Literal["auto", "native", "fused", "eager"]

__all__ = ["Block", "Kernel", "KernelName", "choose_kernel", "why_not_native"]


@functools.cache
def choose_kernel(wanted: KernelName, device: str) -> Kernel:
    """The kernel of that name for a type of device (``"cpu"``, ``"cuda"``).

    ``auto`` takes the fastest that this machine has, as benchmarks/lars_step.py measures them:
    native, else fused on CPU or eager elsewhere.

    Raises:
        ValueError: there is no such kernel for the device; says why and which there are.
    """
    on_cpu = device == "cpu"
    if wanted == "fused" and not on_cpu:
        raise ValueError(
            f"kernel fused runs on CPU; for parameters on {device} allowed: auto, native, eager"
        )
    if wanted in ("auto", "native"):
        reason = why_not_native(device)
        if not reason:
            return NativeKernel() if on_cpu else GpuKernel()
        if wanted == "native":
            others = "auto, fused, eager" if on_cpu else "auto, eager"
            raise ValueError(f"kernel native: {reason}; allowed here: {others}")
    return FusedKernel() if on_cpu and wanted != "eager" else EagerKernel(on_host=on_cpu)


def why_not_native(device: str) -> str:
    """Why this package's own code cannot serve a type of device here; empty where it can."""
    if device == "cpu":
        return why_not_loaded()
    return why_not_gpu() if device == "cuda" else f"it does not know {device}"
