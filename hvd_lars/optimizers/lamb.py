"""LAMB as the config's optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hvd_lars.optimizers.settings import LayerwiseSettings
from hvd_lars.settings.fields import Rate, key

if TYPE_CHECKING:
    from torch import nn

    from hvd_lars.optim import Placement
    from hvd_lars.optim.lamb import LAMB

Beta = Annotated[float, Field(ge=0, lt=1)]
Above = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LambSettings(LayerwiseSettings):
    """LAMB; see hvd_lars.LAMB."""

    name: Literal["lamb"] = key(binds="run and recipe", description="which optimizer")
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = key(
        binds="run and recipe", default=(0.9, 0.999), description="β₁ and β₂ of the moments"
    )
    eps: Above = key(binds="run and recipe", default=1e-6, description="ε beside √v")
    weight_decay: Rate = key(binds="run and recipe", default=0.01, description="weight decay β")
    bias_correction: bool = key(
        binds="run and recipe", default=True, description="divide the moments by 1 − βᵗ"
    )
    grad_averaging: bool = key(
        binds="run and recipe", default=True, description="weigh a gradient in m by 1 − β₁, or by 1"
    )
    max_grad_norm: Above | None = key(
        binds="run and recipe",
        default=1.0,
        description="largest global gradient norm; null for none, as in the paper",
    )
    trust_clip: bool = key(
        binds="run and recipe", default=False, description="cap each layer's ratio at 1"
    )
    max_weight_norm: Above | None = key(
        binds="run and recipe",
        default=None,
        description="φ(z) = min(z, this); cybertronai's pytorch-lamb: 10",
    )

    def build(self, model: nn.Module, lr: float, placement: Placement) -> LAMB:
        """See :meth:`OptimizerSettings.build`."""
        from hvd_lars.optim.lamb import LAMB

        not_options = {"name", "adapt", "decay", "weight_decay", "placement", "max_weight_norm"}
        options = self.model_dump(exclude=not_options)
        if self.max_weight_norm is not None:
            options["max_weight_norm"] = self.max_weight_norm
        return LAMB(self.groups(model), lr=lr, placement=placement, **options)

    @property
    def num_slots(self) -> int:
        """2: both moments."""
        return 2

    def summary(self) -> str:
        """See :meth:`OptimizerSettings.summary`."""
        return f"lamb, betas {self.betas[0]:g}, {self.betas[1]:g}"


KINDS = (LambSettings,)
