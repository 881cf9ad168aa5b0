"""The interface between a LARS step and the ranks.

:class:`~hvd_lars.Replicated` and :class:`~hvd_lars.Sharded` implement it.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol

from torch import Tensor

from hvd_lars.comm.step_scalars import StepScalars
from hvd_lars.optim.distributed.buckets import GradientBuckets
from hvd_lars.optim.distributed.early_norms import EarlyNorms


class Placement(Protocol):
    """Sums gradients over the ranks and assigns each rank the part that it updates."""

    @property
    def gradients(self) -> GradientBuckets:
        """The gradients, accumulated and then summed over the ranks."""
        ...

    @property
    def scalars(self) -> StepScalars:
        """The all-reduce of a step's norms, which can carry other numbers."""
        ...

    @property
    def early(self) -> EarlyNorms | None:
        """Sums of squares of gradients, computed before the step; None if not wanted."""
        ...

    def block(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Return the part of a parameter that this rank updates and its gradient: (n,), (n,)."""
        ...

    def norm_part(self, param: Tensor) -> tuple[int, int]:
        """Return begin and end, within the block, of the elements whose squares this rank sums.

        Raises ValueError if the parameter is not in the placement.
        """
        ...

    def publish_parameters(self) -> None:
        """Send the parameters updated by this step to every rank."""
        ...

    def complete_parameters(self) -> None:
        """Wait for all parameters if the step left that to the next forward."""
        ...

    def whole(self, param: Tensor, part: Tensor) -> Tensor:
        """Return the ranks' parts joined in the parameter's shape; collective."""
        ...

    def part(self, param: Tensor, whole: Tensor) -> Tensor:
        """Return this rank's part, matching its block, of a tensor of the parameter's shape."""
        ...


def check_unmoved(param: Tensor, place: Tensor, moved: bool) -> None:
    """Raise RuntimeError if a parameter has ``moved`` or differs in layout from its ``place``."""
    if moved or param.shape != place.shape or param.stride() != place.stride():
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} was moved or replaced after its placement "
            f"was made for {tuple(place.shape)} with strides {place.stride()} (.to(), .data = …): "
            f"make the placement afterwards, and write into parameters in place"
        )


def check_placed(param: Tensor, placed: Container[Tensor]) -> None:
    """Raise ValueError if the optimizer's parameter is not in the placement."""
    if param not in placed:
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is in the optimizer but not in its "
            f"placement"
        )
