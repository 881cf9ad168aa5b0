"""Trust ratios from norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvd_lars.runtime.readback import Constant


def trust_ratios(
    groups: Sequence[dict[str, Any]],
    group_of: Tensor,
    weight_norms: Tensor,
    gradient_norms: Tensor,
    kept: Constant,
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
        kept: keeps the groups' constants on the device from step to step.

    Source:
        You, Gitman, Ginsburg 2017, arXiv 1708.03888, algorithm 1; LARC for the clip.
    """
    device = weight_norms.device
    table = kept.of(tuple(map(_constants_of, groups)), device)[group_of]
    trust, decay, eps, at_zero = table.unbind(1)
    ratio = trust * weight_norms / (gradient_norms + decay * weight_norms + eps)
    for number, group in enumerate(groups):
        if group["trust_clip"]:
            lr = group["lr"]
            clipped = (ratio / (lr.reshape(()) if isinstance(lr, Tensor) else lr)).clamp(max=1.0)
            ratio = torch.where(group_of == number, clipped, ratio)
    ratio = torch.where((weight_norms == 0) | (gradient_norms == 0), at_zero, ratio)
    return torch.where((weight_norms + gradient_norms).isfinite(), ratio, torch.nan)


def _constants_of(group: dict[str, Any]) -> tuple[float, ...]:
    """Return l, the β that is added to the norm, ε, and λ of a zero norm."""
    decay = group["weight_decay"] if group["denominator"] == "separate" else 0.0
    at_zero = 1.0 if group["zero_norm"] == "unit" else 0.0
    return float(group["trust_coefficient"]), float(decay), float(group["eps"]), at_zero
