"""The interface of all optimizer settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hvd_lars.settings.fields import Rate, Section, key

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hvd_lars.comm.base import Communicator
    from hvd_lars.optim import Placement
    from hvd_lars.optim.protocol import Optimizer


class OptimizerSettings(Section):
    """Settings of a kind of optimizer, and those common to all."""

    FAMILY: ClassVar[str] = "optimizers"  # see SourceSettings

    name: str
    placement: Literal["replicated", "sharded", "auto"] = key(
        binds="nothing",
        default="replicated",
        description="sharded: momentum and update are divided over the ranks; auto: the faster one",
    )

    def build(self, model: nn.Module, lr: float, placement: Placement) -> Optimizer:
        """Return the optimizer of a model whose parameters ``placement`` holds."""
        raise NotImplementedError

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups, each with ``params``, ``adapt`` and ``weight_decay``."""
        raise NotImplementedError

    @property
    def num_slots(self) -> int:
        """State tensors of each parameter's size."""
        raise NotImplementedError

    def summary(self) -> str:
        """Return the name and main options, for ``check``."""
        return self.name

    def resolved(self, device: torch.device, comm: Communicator) -> OptimizerSettings:
        """Return the settings with machine-dependent choices made, except placement; collective.

        Raises:
            UserError: on every rank alike: a rank does not support the settings.
        """
        return self


class LayerwiseSettings(OptimizerSettings):
    """Settings of an optimizer whose layers have a rate each."""

    TRUST_RATIOS: ClassVar[bool] = True

    adapt: Literal["weights", "layer", "all"] = key(
        binds="run and recipe",
        default="weights",
        description="weights: only weights have a trust ratio; layer: biases use their weight's; "
        "all: each tensor has its own",
    )
    decay: Literal["weights", "all"] = key(
        binds="run and recipe",
        default="weights",
        description="weights: biases and normalisation do not decay; all: every tensor does",
    )
    weight_decay: Rate = key(binds="run and recipe", default=0.0, description="weight decay β")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """See :meth:`OptimizerSettings.groups`."""
        from hvd_lars.optim import parameter_groups

        adapt = self.adapt if self.TRUST_RATIOS else "none"
        return parameter_groups(model, self.weight_decay, adapt, self.decay)
