"""Trust ratios from norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from hvd_lars.runtime.readback import table_of


class LayerConstants(NamedTuple):
    """Every layer's l, the β that is added to its norm, ε, and λ at zero norms.

    Each is (layers,) float64 on the device; ``eps`` is None if all are 0.  ``at_zero`` is λ where
    ‖g‖ = 0, ``at_zero_weight`` where ‖w‖ = 0; None if they are equal for all layers.  ``rows`` has
    all five, (layers, 5).
    """

    rows: Tensor
    trust: Tensor
    decay: Tensor
    eps: Tensor | None
    at_zero: Tensor
    at_zero_weight: Tensor | None


@final
class KeptConstants:
    """The constants of the same layers, copied to their device again when a group changes.

    The owner keeps the tensors alive: a captured CUDA graph reads them without references.
    """

    def __init__(self) -> None:
        self._values: list[tuple[float, ...]] = []
        self._constants: LayerConstants | None = None

    def of(self, groups: Sequence[dict[str, Any]], group_of: Tensor) -> LayerConstants:
        """Return the constants; ``group_of`` is each layer's index in ``groups``."""
        values = list(map(_constants_of, groups))
        if self._constants is None or values != self._values:
            rows = table_of(values, np.float64, group_of.device).reshape(-1, 5)[group_of]
            trust, decay, eps, at_zero, at_zero_weight = rows.t().contiguous().unbind()
            has_eps = any(value[2] != 0 for value in values)
            differ = any(value[3] != value[4] for value in values)
            self._constants = LayerConstants(
                rows,
                trust,
                decay,
                eps if has_eps else None,
                at_zero,
                at_zero_weight if differ else None,
            )
            self._values = values
        return self._constants


def trust_ratios(
    groups: Sequence[dict[str, Any]],
    group_of: Tensor,
    weight_norms: Tensor,
    gradient_norms: Tensor,
    constants: LayerConstants,
) -> Tensor:
    """Return λ of every layer that has its own, (layers,) float64.

    λ = l‖w‖ / (‖g‖ + β‖w‖ + ε), or l‖w‖ / (‖g + βw‖ + ε) with a combined norm, subject to
    ``trust_clip`` and ``zero_norm``.  A non-finite norm makes λ NaN, since any number would be a
    wrong step size.  Stays on the device.

    Args:
        groups: parameter groups.
        group_of: index of each layer's group, (layers,) int64.
        weight_norms: (layers,) float64, all on one device.
        gradient_norms: of the same layers.
        constants: of these layers.

    Source:
        You, Gitman, Ginsburg 2017, arXiv 1708.03888, algorithm 1; LARC for the clip.
    """
    _, trust, decay, eps, at_zero, at_zero_weight = constants
    denominator = torch.addcmul(gradient_norms, decay, weight_norms)
    if eps is not None:
        denominator += eps
    ratio = trust * weight_norms / denominator
    for number, group in enumerate(groups):
        if group["trust_clip"]:
            lr = group["lr"]
            clipped = (ratio / (lr.reshape(()) if isinstance(lr, Tensor) else lr)).clamp(max=1.0)
            ratio = torch.where(group_of == number, clipped, ratio)
    if at_zero_weight is not None:
        at_zero = torch.where(weight_norms == 0, at_zero_weight, at_zero)
    ratio = torch.where(torch.minimum(weight_norms, gradient_norms) == 0, at_zero, ratio)
    # Adds 0 if both norms are finite, and NaN if not: also 0 · ∞ in the denominator is NaN.
    return torch.add(ratio, denominator, alpha=0)


def _constants_of(group: dict[str, Any]) -> tuple[float, ...]:
    """Return l, the β that is added to the norm, ε, and λ where ‖g‖ = 0 and where ‖w‖ = 0."""
    decay = group["weight_decay"] if group["denominator"] == "separate" else 0.0
    at_zero = {"unit": (1.0, 1.0), "coast": (0.0, 1.0), "skip": (0.0, 0.0)}[group["zero_norm"]]
    return float(group["trust_coefficient"]), float(decay), float(group["eps"]), *at_zero
