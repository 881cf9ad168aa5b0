"""What a step found out about its layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hvd_lars.optim.layers import Layers, Measured


class LayerNorms(NamedTuple):
    """A layer in a step: ‖w‖ before it, ‖g‖ (‖g + βw‖ where the denominator is combined), λ, γλ."""

    param: Tensor
    weight: float
    gradient: float
    ratio: float
    rate: float


def layer_norms(found: Sequence[tuple[Layers, Measured]]) -> list[LayerNorms]:
    """Every layer whose norms were taken; waits for the device."""
    rows = []
    for here, measured in found:
        ratios, weights, gradients = (each.tolist() for each in measured)
        for i, source in enumerate(here.sources):
            layer, ratio = here.layers[source], ratios[source]
            rate = ratio * float(layer.group["lr"])
            rows.append(LayerNorms(layer.param, weights[i], gradients[i], ratio, rate))
    return rows


def first_not_finite(found: Sequence[tuple[Layers, Measured]]) -> Tensor | None:
    """The first parameter whose gradient's norm was not finite; waits for the device."""
    for here, measured in found:
        bad = measured.gradients.isfinite().logical_not().nonzero()
        if len(bad):
            return here.adapted[int(bad[0])]
    return None


def kept_sums(
    memory: Tensor | None, sums: tuple[Tensor | None, Tensor] | None, known: Tensor | None
) -> Tensor | None:
    """What is known of the weights after an update, in the memory of what was known before.

    In the same memory, since a step in a CUDA graph reads at each replay what the one before it
    left there.
    """
    if sums is None:
        return None
    before, after = sums
    if (
        before is not None
        and known is not None
        and not torch.allclose(before, known, rtol=0.0, atol=0.0, equal_nan=True)
    ):
        warnings.warn(
            "weights were edited through .data between two steps: this step took its trust "
            "ratios from their norms before that",
            RuntimeWarning,
            stacklevel=5,
        )
    return after if memory is None else memory.copy_(after)
