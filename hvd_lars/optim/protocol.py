"""The optimizer interface that the trainer, checkpoints and records rely on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from hvd_lars.optim.device_step import StepReport
from hvd_lars.optim.kernels import Scale


class Optimizer(Protocol):
    """An optimizer over ranks, such as :class:`~hvd_lars.LARS`.

    Slots are the named tensors kept for every parameter, in its shape or 0-dim.
    Checkpoints store slot ``s`` of parameter ``p`` as ``s/p``.
    """

    slots: tuple[str, ...]
    param_groups: list[dict[str, Any]]
    report: StepReport  # of the last step

    def zero_grad(self) -> None:
        """Begin a new window of gradients."""
        ...

    def step(self, closure: None = None, loss_scale: Scale | None = None) -> None:
        """Take one step with gradients of the loss times ``loss_scale``.

        All ranks skip the step if a gradient norm is not finite.
        """
        ...

    def slot(self, name: str, param: Tensor) -> Tensor | None:
        """Return a parameter's whole slot, or None before its first step.

        Collective under a placement.
        """
        ...

    def new_slot(self, name: str, param: Tensor) -> Tensor:
        """Return zeros of a whole slot's shape, to be filled and given to :meth:`set_slots`."""
        ...

    def set_slots(self, param: Tensor, values: Mapping[str, Tensor]) -> None:
        """Replace a parameter's state with these whole slots."""
        ...
