"""What a LARS step asks of the ranks around it.

:class:`~hvd_lars.Replicated` and :class:`~hvd_lars.Sharded` do it.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol

from torch import Tensor

from hvd_lars.comm.step_scalars import StepScalars
from hvd_lars.optim.distributed.buckets import GradientBuckets
from hvd_lars.optim.distributed.early_norms import EarlyNorms


class Placement(Protocol):
    """Where gradients are summed and which rank updates what."""

    @property
    def gradients(self) -> GradientBuckets:
        """The gradients: accumulated, then summed over the ranks."""
        ...

    @property
    def scalars(self) -> StepScalars:
        """The all-reduce of a step's norms, on which other numbers may ride."""
        ...

    @property
    def early(self) -> EarlyNorms | None:
        """Sums of squares of gradients taken before the step; None where they are not wanted."""
        ...

    def block(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """What this rank updates of a parameter, and its summed gradient: (n,), (n,)."""
        ...

    def norm_part(self, param: Tensor) -> tuple[int, int]:
        """Begin and end, within the block, of the elements whose squares this rank sums.

        Raises ValueError where the parameter is not among the placement's.
        """
        ...

    def publish_parameters(self) -> None:
        """The step is done: give every rank the parameters that it updated."""
        ...

    def complete_parameters(self) -> None:
        """Wait until all of them are there, where that was left to the next forward."""
        ...

    def whole(self, param: Tensor, part: Tensor) -> Tensor:
        """Every rank's ``part`` put together in the parameter's shape; collective."""
        ...

    def part(self, param: Tensor, whole: Tensor) -> Tensor:
        """This rank's part, like its block, of a tensor of the parameter's shape."""
        ...


def check_unmoved(param: Tensor, place: Tensor, moved: bool) -> None:
    """Raise RuntimeError where a parameter no longer lies as its ``place``, or has ``moved``."""
    if moved or param.shape != place.shape or param.stride() != place.stride():
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} was moved or replaced after its placement "
            f"was made for {tuple(place.shape)} with strides {place.stride()} (.to(), .data = …): "
            f"make the placement after that, and write into parameters in place"
        )


def check_placed(param: Tensor, placed: Container[Tensor]) -> None:
    """Raise ValueError where the optimizer's parameter is not among the placement's."""
    if param not in placed:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is in the optimizer but not in its "
            f"placement"
        )
