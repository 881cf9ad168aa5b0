"""Trust ratios from norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def trust_ratios(
    groups: Sequence[dict[str, Any]], weight_norms: Tensor, gradient_norms: Tensor
) -> Tensor:
    """Return λ of every layer that has its own, by the layers' groups; all (layers,), float64.

    λ = l‖w‖ / (‖g‖ + β‖w‖ + ε), or l‖w‖ / (‖g + βw‖ + ε) with a combined norm, subject to
    ``trust_clip`` and ``zero_norm``.  A non-finite norm makes λ NaN, since any number would be a
    wrong step size.  Stays on the device.

    Source:
        You, Gitman, Ginsburg 2017, arXiv 1708.03888, algorithm 1; LARC for the clip.
    """
    parts = []
    begin = 0
    while begin < len(groups):
        group, end = groups[begin], begin + 1
        while end < len(groups) and groups[end] is group:
            end += 1
        weight, gradient = weight_norms[begin:end], gradient_norms[begin:end]
        if group["denominator"] == "separate" and group["weight_decay"] != 0:
            divisor = gradient + group["weight_decay"] * weight + group["eps"]
        else:
            divisor = gradient + group["eps"]
        ratio = group["trust_coefficient"] * weight / divisor
        if group["trust_clip"]:
            lr = group["lr"]
            ratio = (ratio / (lr.reshape(()) if isinstance(lr, Tensor) else lr)).clamp(max=1.0)
        at_zero = 1.0 if group["zero_norm"] == "unit" else 0.0
        ratio = torch.where((weight == 0) | (gradient == 0), at_zero, ratio)
        parts.append(torch.where((weight + gradient).isfinite(), ratio, torch.nan))
        begin = end
    return torch.cat(parts)
