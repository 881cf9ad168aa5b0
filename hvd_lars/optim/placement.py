"""What a LARS step asks of the ranks around it; imports kernels and stopwatch.

:class:`~hvd_lars.optim.replicated.Replicated` and :class:`~hvd_lars.optim.sharded.Sharded` do it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from hvd_lars.optim.kernels import Kernel
from hvd_lars.stopwatch import Stopwatch


class Placement(Protocol):
    """Where gradients are summed and which rank updates what."""

    def timed_by(self, watch: Stopwatch) -> None:
        """Give the time spent waiting for other ranks to ``communication``."""
        ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward passes inside only accumulate: for all but a window's last micro-batch."""
        ...

    def zero_gradients(self) -> None:
        """Begin a new accumulation window."""
        ...

    def reduce_gradients(self) -> None:
        """Return when the gradients are sums over the ranks; again is a no-op."""
        ...

    def block(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """What this rank updates of a parameter, and its summed gradient: (n,), (n,)."""
        ...

    def norm_part(self, param: Tensor) -> tuple[int, int]:
        """Begin and end, within the block, of the elements whose squares this rank sums.

        Raises ValueError where the parameter is not among the placement's.
        """
        ...

    def sum_early(self, kernel: Kernel | None) -> None:
        """The kernel that may sum the gradients' squares as reductions complete; None: do not."""
        ...

    def early_sums(self, params: Sequence[Tensor]) -> Tensor | None:
        """Those sums for this step, of the norm parts: (len(params),), float64.

        None where they were not taken or somebody has edited the gradients since.
        """
        ...

    def complete_sums(self, sums: Tensor) -> Tensor:
        """Sum (n,) float64 over the ranks; the same bits on each."""
        ...

    def publish_parameters(self) -> None:
        """The step is done: give every rank the parameters that it updated."""
        ...

    def whole(self, param: Tensor, part: Tensor) -> Tensor:
        """Every rank's ``part`` put together in the parameter's shape; collective."""
        ...

    def part(self, param: Tensor, whole: Tensor) -> Tensor:
        """This rank's part, like its block, of a tensor of the parameter's shape."""
        ...


def check_placed(param: Tensor, placed: Container[Tensor]) -> None:
    """Raise ValueError where the optimizer's parameter is not among the placement's."""
    if param not in placed:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is in the optimizer but not in its "
            f"placement"
        )
