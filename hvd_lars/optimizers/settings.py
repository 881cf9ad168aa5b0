"""The settings of an optimizer: what the trainer asks of every kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hvd_lars.settings.fields import Section, key

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hvd_lars.comm.base import Communicator
    from hvd_lars.optim import Placement
    from hvd_lars.optim.protocol import Optimizer


class OptimizerSettings(Section):
    """A kind of optimizer, and what is common to all."""

    FAMILY: ClassVar[str] = "optimizers"  # as of SourceSettings

    name: str
    placement: Literal["replicated", "sharded", "auto"] = key(
        binds="nothing",
        default="replicated",
        description="sharded: momentum and update divided over the ranks; auto: the faster one",
    )

    def build(self, model: nn.Module, lr: float, placement: Placement) -> Optimizer:
        """The optimizer of a model whose parameters are in the placement."""
        raise NotImplementedError

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups, each with ``params``, ``adapt`` and ``weight_decay``."""
        raise NotImplementedError

    @property
    def num_slots(self) -> int:
        """Tensors of each parameter's size that it keeps."""
        raise NotImplementedError

    def summary(self) -> str:
        """Name and main options, for ``check``."""
        return self.name

    def resolved(self, device: torch.device, comm: Communicator) -> OptimizerSettings:
        """The settings without what this machine decides, but for the placement; collective.

        Raises:
            UserError: on every rank alike: some rank cannot do what is asked for.
        """
        return self
