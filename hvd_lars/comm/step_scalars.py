"""The few numbers of a step that are summed over the ranks."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hvd_lars.comm.base import Communicator
from hvd_lars.runtime.stopwatch import Stopwatch


@final
class StepScalars:
    """One all-reduce a step: of what a caller sums, and of what others let ride along.

    Args:
        comm: the ranks.
        name: of the reduction, the same on all ranks.
        watch: its part "communication" is the time spent here.
    """

    def __init__(self, comm: Communicator, name: str, watch: Stopwatch | None = None) -> None:
        self._comm, self._name, self._watch = comm, name, watch or Stopwatch()
        self._added: Tensor | None = None
        self._summed: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Let (n,) float64 ride along with the next :meth:`sum`, in place of what was added."""
        self._added, self._summed = values, None

    def sum(self, values: Tensor) -> Tensor:
        """Sum (n,) float64 over the ranks and return them, the same bits on each; collective."""
        count, added = len(values), self._added
        if added is not None:
            values, self._added = torch.cat([values, added.to(values.device)]), None
        with self._watch.part("communication"):
            self._comm.start_all_reduce_sum(values, self._name).wait()
        if added is not None:
            self._summed = values[count:]
        return values[:count]

    def take(self) -> Tensor | None:
        """What was added, summed over the ranks; None where no :meth:`sum` came since."""
        summed, self._summed, self._added = self._summed, None, None
        return summed
