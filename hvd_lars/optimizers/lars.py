"""LARS as the config's optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from hvd_lars.optimizers.settings import LayerwiseSettings
from hvd_lars.settings.fields import Rate, key

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hvd_lars.comm.base import Communicator
    from hvd_lars.optim import LARS, Placement


class LarsSettings(LayerwiseSettings):
    """LARS; see hvd_lars.LARS."""

    name: Literal["lars"] = key(
        binds="run and recipe", default="lars", description="which optimizer"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = key(
        binds="run and recipe", default=0.9, description="momentum μ"
    )
    trust_coefficient: Annotated[float, Field(gt=0, allow_inf_nan=False)] = key(
        binds="run and recipe", default=0.001, description="l in λ = l · ‖w‖ / (‖g‖ + β‖w‖ + ε)"
    )
    eps: Rate = key(binds="run and recipe", default=0.0, description="ε in λ")
    nesterov: bool = key(
        binds="run and recipe", default=False, description="look ahead by one momentum step"
    )
    lr_position: Literal["momentum", "update"] = key(
        binds="run and recipe",
        default="momentum",
        description="where γ applies: inside the momentum (the paper), or to the whole update",
    )
    denominator: Literal["separate", "combined"] = key(
        binds="run and recipe",
        default="separate",
        description="‖g‖ + β‖w‖ (the paper), or ‖g + βw‖ (optax, SimCLR)",
    )
    trust_clip: bool = key(
        binds="run and recipe",
        default=False,
        description="cap each layer's rate at γ: min(λ/γ, 1) in place of λ (LARC)",
    )
    zero_norm: Literal["unit", "skip", "coast"] = key(
        binds="run and recipe",
        default="unit",
        description="at a zero norm, unit: λ = 1; skip: no change; coast: momentum only if ‖g‖ = 0",
    )
    kernel: Literal["auto", "native", "fused", "eager"] = key(
        binds="nothing",
        default="auto",
        description="implementation of the step; auto: the fastest that all ranks have",
    )

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> LarsSettings:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov is true with momentum 0; it needs momentum above 0")
        return self

    def build(self, model: nn.Module, lr: float, placement: Placement) -> LARS:
        """See :meth:`OptimizerSettings.build`."""
        from hvd_lars.optim import LARS

        not_options = {"name", "adapt", "decay", "weight_decay", "placement"}
        options = self.model_dump(exclude=not_options)
        return LARS(self.groups(model), lr=lr, placement=placement, **options)

    @property
    def num_slots(self) -> int:
        """1 for the momentum, or 0 without it."""
        return int(self.momentum > 0)

    def summary(self) -> str:
        """See :meth:`OptimizerSettings.summary`."""
        nesterov = ", Nesterov" if self.nesterov else ""
        return f"{self.name}, momentum {self.momentum:g}{nesterov}"

    def resolved(self, device: torch.device, comm: Communicator) -> LarsSettings:
        """Return the settings with a kernel that all ranks have."""
        from hvd_lars.optim.kernels.agreed import agree_on_kernel

        return self.model_copy(update={"kernel": agree_on_kernel(self.kernel, device, comm)})


KINDS = (LarsSettings,)
