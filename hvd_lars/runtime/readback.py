"""Values that go to the device, or come from it, without the host waiting."""

from __future__ import annotations

import functools
from typing import Any, final

import numpy as np
import torch
from torch import Tensor


@final
class Readback:
    """A copy of some values on its way to the host.

    On a GPU it goes into page-locked memory behind the work queued so far; on a CPU there is
    nothing to copy.

    Args:
        values: (n,) float64 on any device; must not change before :meth:`read`.
    """

    def __init__(self, values: Tensor) -> None:
        self._host, self._arrived = values, None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> list[float]:
        """Return the values; waits if they have not arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._host.numpy().tolist()
        return values


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values`` on ``device``; the host does not wait for a device to receive them."""
    if values.device == device:
        return values
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=device.type != "cpu")


@functools.lru_cache(maxsize=256)
def constants(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """Return int64 or float64 values on ``device``: the same tensor for the same values.

    It must not be written to.
    """
    array = np.array(values)
    return send(
        torch.from_numpy(array if array.dtype == np.int64 else array.astype(np.float64)), device
    )


def on_host(tensor: Tensor) -> Tensor:
    """Return ``tensor`` itself on a CPU; otherwise a copy in page-locked memory, complete."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
