"""Interchangeable implementations of a step's arithmetic over many layers.

``native`` is this package's own code (C++ on CPU, Triton on a GPU), ``fused`` is torch's fused SGD
with LARS folded into its coefficients, ``eager`` is plain torch.  Only :func:`choose_kernel`
chooses among them.
"""

from __future__ import annotations

import functools
from typing import Literal

from hvd_lars.optim.kernels.block import Block, Kernel, KnownRatios, RatioInputs, Scale
from hvd_lars.optim.kernels.eager import EagerKernel
from hvd_lars.optim.kernels.fused import FusedKernel
from hvd_lars.optim.kernels.gpu import GpuKernel, why_not_gpu
from hvd_lars.optim.kernels.native import NativeKernel, why_not_loaded

KernelName = Literal["auto", "native", "fused", "eager"]

__all__ = [
    "Block",
    "Kernel",
    "KernelName",
    "KnownRatios",
    "RatioInputs",
    "Scale",
    "choose_kernel",
    "why_not_native",
]


@functools.cache
def choose_kernel(wanted: KernelName, device: str) -> Kernel:
    """Return the kernel of that name for a type of device (``"cpu"``, ``"cuda"``).

    ``auto`` takes the fastest that is available, as measured by benchmarks/lars_step.py: native,
    else fused on CPU or eager elsewhere.

    Raises:
        ValueError: the device has no such kernel; the message says why and what is allowed.
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
    """Return why the native kernel cannot run on a type of device here; empty if it can."""
    if device == "cpu":
        return why_not_loaded()
    return why_not_gpu() if device == "cuda" else f"it does not know {device}"
