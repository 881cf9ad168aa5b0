"""Reduced precision in forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hvd_lars.runtime.readback import send

Precision = Literal["fp32", "bf16", "fp16"]

_FLOOR, _GROWTH_STEPS = 1.0, 2000
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: torch's autocast, or none for ``fp32``.

    Weights, gradients when summed over ranks, momentum and norms stay float32.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


class LossScale(NamedTuple):
    """The factor of the loss that keeps float16 gradients above zero and below infinity.

    Halved when a step overflows, but not below 1, where it would no longer help; doubled after
    2,000 steps without overflow.

    Source:
        Micikevicius et al. 2018, arXiv 1710.03740, §3.2; the values are those of torch.amp.
    """

    value: float = 2.0**16
    good_steps: int = 0  # since it last changed

    @classmethod
    def of(cls, value: float, good_steps: int) -> LossScale:
        """Return the scale of a checkpoint, or the initial one if it has none (0)."""
        return cls(max(value, _FLOOR), good_steps) if value else cls()

    @property
    def at_floor(self) -> bool:
        """Whether a step that is not finite has another cause than the scale."""
        return self.value <= _FLOOR

    def on(self, device: torch.device) -> Tensor:
        """Return value and good steps on ``device``, (2,) float64."""
        return send(torch.tensor(self, dtype=torch.float64), device)


def scale_after(scale: Tensor, kept: Tensor) -> Tensor:
    """Return the scale of the next step, (2,) float64 as :meth:`LossScale.on`.

    ``kept``, a 0-dim bool on the same device, is False if the step was skipped, on all ranks alike.
    """
    value, good_steps = scale.unbind()
    good_steps = good_steps + 1.0
    grown = good_steps == _GROWTH_STEPS
    after_good = torch.stack([value * (1.0 + grown), torch.where(grown, 0.0, good_steps)])
    after_bad = torch.stack([(value / 2.0).clamp_min(_FLOOR), torch.zeros_like(value)])
    return torch.where(kept, after_good, after_bad)
