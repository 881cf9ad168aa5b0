"""A moving average of a model that omits skipped steps without the host knowing of them."""

from __future__ import annotations

from itertools import compress

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from hvd_lars.runtime.joined import by_kind, is_expanded, join, write


class MovingAverage(AveragedModel):
    """Average of parameters and buffers: e ← e + (1 − decay)·(w − e); the first w is copied.

    Args:
        model: the model to follow; copied.
        decay: of the average.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, use_buffers=True)
        self._decay, self._begun = decay, False
        # Expanded buffers are constants, and cannot be written to.
        self._followed = [not is_expanded(tensor) for tensor in _tensors(model)]
        # torch keeps the count on the CPU, where a device could not add to it.
        self.n_averaged = self.n_averaged.to(next(model.parameters()).device)

    @torch.no_grad()
    def follow(self, model: nn.Module, kept: Tensor) -> None:
        """Take a step unless ``kept``, a 0-dim bool, is False.

        The host waits for the device until a first step was taken, and then no more.
        """
        self._begun = self._begun or bool(self.n_averaged)
        means, values = (
            list(compress(_tensors(each), self._followed)) for each in (self.module, model)
        )
        for positions in by_kind(means):
            old, new = ([side[i] for i in positions] for side in (means, values))
            taken = kept.to(old[0].device)
            if not self._begun:
                write(old, torch.where(taken, join(new), join(old)))
                continue
            share = taken.double() * (1.0 - self._decay)
            if old[0].is_floating_point() or old[0].is_complex():
                changes = torch._foreach_sub(new, old)
                torch._foreach_mul_(changes, share.to(old[0].dtype))
                torch._foreach_add_(old, changes)
            else:  # whole numbers are rounded towards zero
                before, after = join(old).double(), join(new).double()
                write(old, before + (after - before) * share)
        self.n_averaged += kept.to(self.n_averaged)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]
