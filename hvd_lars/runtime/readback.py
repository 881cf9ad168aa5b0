"""Values that go to the device, or come from it, without the host waiting."""

from __future__ import annotations

from collections.abc import Sequence
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


def table_of(values: Sequence[Any], dtype: Any, device: torch.device) -> Tensor:
    """Return numbers, or rows of them, in NumPy's ``dtype`` on ``device``."""
    return send(torch.from_numpy(np.array(values, dtype=dtype)), device)


@final
class Constant:
    """Numbers on a device, copied there again when they change.

    The owner keeps the tensor alive: a captured CUDA graph reads it without a reference of its own.
    """

    def __init__(self) -> None:
        self._values: object = None
        self._tensor: Tensor | None = None

    def of(self, values: tuple[Any, ...], device: torch.device) -> Tensor:
        """Return ``values``, or rows of them, as float64 on ``device``; not to be written to."""
        if self._tensor is None or self._values != values or self._tensor.device != device:
            self._values, self._tensor = values, table_of(values, np.float64, device)
        return self._tensor


def on_host(tensor: Tensor) -> Tensor:
    """Return ``tensor`` itself on a CPU; otherwise a copy in page-locked memory, complete."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
