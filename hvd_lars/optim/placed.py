"""What optimizers over a placement have in common."""

from __future__ import annotations

import sys
from typing import Any

from torch.optim import Optimizer

from hvd_lars.optim.distributed.buckets import placed_already
from hvd_lars.optim.distributed.placement import Placement
from hvd_lars.optim.groups import resolve_owners
from hvd_lars.runtime import torch_internals


class PlacedOptimizer(Optimizer):
    """An optimizer whose gradients a placement may sum over ranks."""

    # A class attribute: copies and Horovod's DistributedOptimizer lose instance attributes.
    placement: Placement | None = None

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError for an invalid hyper-parameter or tensor of a group just added."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does, after checking its hyper-parameters and tensors."""
        torch_internals.add_param_group(self, param_group)
        try:
            resolve_owners(self.param_groups)
            self._check_group(param_group)
            if self.placement is not None:
                for param in param_group["params"]:
                    self.placement.norm_part(param)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_not_placed(self) -> None:
        """Raise RuntimeError if the parameters are in a placement that was not passed here."""
        params = [param for group in self.param_groups for param in group["params"]]
        if (placed := placed_already(params)) is not None:
            name, shape = type(self).__name__, tuple(placed.shape)
            if hasattr(self, "skip_synchronize"):
                raise RuntimeError(
                    f"hvd.DistributedOptimizer is around a {name} whose parameters (such as one of "
                    f"shape {shape}) are in a placement: both sum the gradients; remove one of them"
                )
            raise RuntimeError(
                f"a parameter of shape {shape} is in a placement that its optimizer was not given: "
                f"pass it as {name}(…, placement=placement)"
            )

    def _check_not_horovods_restore(self) -> None:
        """Raise RuntimeError if Horovod takes a step with zero gradients to make a state."""
        if self.state:
            return
        name, frame = type(self).__name__, sys._getframe()
        while (caller := frame.f_back) is not None:
            if caller.f_code.co_name == "broadcast_optimizer_state":
                raise RuntimeError(
                    "hvd.broadcast_optimizer_state takes a step with zero gradients on ranks that "
                    f"have no state yet, which would change their weights: a new {name} needs no "
                    "broadcast; to restore one, load its state_dict() on every rank (send it by "
                    "hvd.broadcast_object)"
                )
            frame = caller

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients; a placement keeps its flat buffers."""
        if self.placement is None:
            torch_internals.zero_grad(self, set_to_none)
        else:
            self.placement.gradients.zero()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copy and pickle.

        Raises RuntimeError under a placement, which the copy would lose.
        """
        if self.placement is not None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name} with a placement cannot be copied or pickled: make a new {name} with its "
                f"own placement, and load this one's state_dict() into it"
            )
        state: dict[str, Any] = super().__getstate__()
        return state
