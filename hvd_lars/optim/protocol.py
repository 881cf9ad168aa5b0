"""The interface that the trainer, checkpoints and records ask of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from hvd_lars.optim.device_step import StepReport


class Optimizer(Protocol):
    """An optimizer over ranks; :class:`~hvd_lars.LARS` is one.

    Slots are the tensors that it keeps for every parameter, by name and in the parameter's shape.
    Checkpoints hold slot ``s`` of parameter ``p`` as ``s/p``.
    """

    slots: tuple[str, ...]
    param_groups: list[dict[str, Any]]
    report: StepReport  # of the last step

    def zero_grad(self) -> None:
        """Begin a window of gradients."""
        ...

    def step(self, closure: None = None, loss_scale: float | None = None) -> None:
        """Take one step with gradients of the loss times ``loss_scale``.

        All ranks skip the step where a gradient's norm is not finite.
        """
        ...

    def slot(self, name: str, param: Tensor) -> Tensor | None:
        """A parameter's slot, whole; None before its first step.  Collective under a placement."""
        ...

    def set_slots(self, param: Tensor, values: Mapping[str, Tensor]) -> None:
        """Replace a parameter's state by these whole slots."""
        ...
