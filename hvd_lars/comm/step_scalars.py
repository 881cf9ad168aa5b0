"""Scalars of a step, summed over the ranks in one all-reduce."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hvd_lars.comm.base import Communicator
from hvd_lars.runtime.readback import send
from hvd_lars.runtime.stopwatch import Stopwatch


@final
class StepScalars:
    """Sums a step's values, and values added by others, in one all-reduce.

    Args:
        comm: the ranks.
        name: name of the reduction, the same on all ranks.
        watch: its part "communication" is the time spent here.
    """

    def __init__(self, comm: Communicator, name: str, watch: Stopwatch | None = None) -> None:
        self._comm, self._name, self._watch = comm, name, watch or Stopwatch()
        self._added: list[Tensor] = []
        self._summed: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Append (n,) float64, on the host or the device, to the next :meth:`sum`."""
        self._added.append(values)

    def sum(self, values: Tensor) -> Tensor:
        """Return (n,) float64 summed over the ranks, bitwise equal on all; collective."""
        count, added = len(values), self._added
        if added:
            values = torch.cat([values, *(send(each, values.device) for each in added)])
            self._added = []
        with self._watch.part("communication"):
            self._comm.start_all_reduce_sum(values, self._name).wait()
        if added:
            self._summed = values[count:]
        return values[:count]

    def take(self) -> Tensor | None:
        """Return the added values, in order, summed over the ranks, on the device.

        None if nothing was added, or there was no :meth:`sum` since.
        """
        summed, self._summed, self._added = self._summed, None, []
        return summed
