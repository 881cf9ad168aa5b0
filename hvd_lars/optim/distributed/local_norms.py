"""Sums of squares of a rank's own gradient, before it is summed over the ranks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import final

import torch
from torch import Tensor

from hvd_lars.optim.norms import sums_of_squares


@final
class LocalNorms:
    """Takes one extra pass over the gradients of a window that asks for it, and none otherwise."""

    def __init__(self) -> None:
        self._wanted = False
        self._sums: dict[int, Tensor] = {}  # by bucket

    def ask(self) -> None:
        """Take the sums of the window that begins."""
        self._wanted, self._sums = True, {}

    @torch.no_grad()
    def note(self, b: int, views: Sequence[Tensor], present: Collection[int]) -> None:
        """Sum the squares of the bucket at position ``b`` if wanted and not done in this window.

        Args:
            b: the bucket's position.
            views: the gradients of its parameters.
            present: positions of the parameters that have a gradient; the others' count as 0.
        """
        if self._wanted and b not in self._sums:
            sums = sums_of_squares(views)
            if len(present) < len(views):
                there = torch.tensor([i in present for i in range(len(views))])
                sums = torch.where(there.to(sums.device), sums, 0.0)
            self._sums[b] = sums

    def take(self) -> Tensor:
        """Return the sums of squares of all parameters, in the order of the buckets."""
        found = torch.cat([self._sums[b] for b in sorted(self._sums)])
        self._wanted, self._sums = False, {}
        return found
