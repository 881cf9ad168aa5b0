"""Numbers of fewer bits in forward and backward."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, final

import torch

Precision = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """What the forward pass runs in: torch's autocast, or nothing for ``fp32``.

    Weights, gradients as they are summed over ranks, momentum and norms stay float32.
    """
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, _DTYPES[precision])


@final
class LossScale:
    """The factor of the loss that keeps float16 gradients above zero and below infinity.

    Halved when a step overflows, but not below 1, where it would no longer help; doubled after
    ``growth_steps`` steps without one.

    Source:
        Micikevicius et al. 2018, arXiv 1710.03740, §3.2; the values are those of torch.amp.
    """

    FLOOR = 1.0

    def __init__(self, value: float = 2.0**16, growth_steps: int = 2000) -> None:
        self.value, self._growth_steps, self.good_steps = value, growth_steps, 0

    @property
    def at_floor(self) -> bool:
        """Whether a step that is not finite now is so for another reason than the scale."""
        return self.value <= self.FLOOR

    def update(self, skipped: bool) -> None:
        """Take note of a step; all ranks must say the same."""
        if skipped:
            self.value, self.good_steps = max(self.value / 2.0, self.FLOOR), 0
            return
        self.good_steps += 1
        if self.good_steps == self._growth_steps:
            self.value, self.good_steps = self.value * 2.0, 0
