"""Sums of squares of gradients, taken while the next bucket is still being reduced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from hvd_lars.optim.distributed.buckets import GradientBuckets
from hvd_lars.optim.kernels import Kernel
from hvd_lars.optim.kernels.block import Tabled
from hvd_lars.runtime.torch_internals import versions_of


@final
class EarlyNorms:
    """Sums each bucket's squares as its reduction completes, once a step has asked for them.

    Args:
        parts: returns, for the bucket at a position, one tensor per parameter with the elements
            whose squares this rank sums: the same views in every step.
    """

    def __init__(self, parts: Callable[[int], list[Tensor]]) -> None:
        self._parts, self._kept = parts, dict[int, Tabled[Tensor]]()
        self._kernel: Kernel | None = None
        self._sums: dict[int, tuple[Tensor, int]] = {}  # by bucket: sums, version of its memory
        self._asked: tuple[Sequence[Tensor], Tensor] | None = None  # parameters, their order

    @torch.no_grad()
    def on_reduced(self, b: int, flat: Tensor) -> None:
        """Sum the squares of the bucket at position ``b``, which is now summed over the ranks."""
        if self._kernel is not None:
            if b not in self._kept:
                self._kept[b] = Tabled(self._parts(b))
            sums = self._kernel.sums_of_squares(self._kept[b])
            self._sums[b] = (sums, versions_of([flat])[0])

    def take(
        self, params: Sequence[Tensor], gradients: GradientBuckets, kernel: Kernel | None
    ) -> Tensor | None:
        """Return this window's sums for ``params``, (len(params),) float64.

        None if they were not computed, or if the gradients were edited since.

        Args:
            params: the parameters; the same list object in every step.
            gradients: the buckets.
            kernel: sums the squares from the next window on; None to stop.
        """
        before, self._kernel = self._kernel, kernel
        versions = versions_of(bucket.flat for bucket in gradients.buckets)
        found = [self._sums.pop(b, None) for b in range(len(versions))]
        if before is None or kernel is None:
            return None
        taken = [
            entry[0]
            for entry, version in zip(found, versions, strict=True)
            if entry is not None and entry[1] == version
        ]
        if len(taken) < len(versions):
            return None
        together = torch.cat(taken)
        if self._asked is None or self._asked[0] is not params:
            params_in_order = [p for bucket in gradients.buckets for p in bucket.params]
            order: dict[Tensor, int] = {p: i for i, p in enumerate(params_in_order)}
            index = torch.tensor([order[param] for param in params], device=together.device)
            self._asked = (params, index)
        return together[self._asked[1]]
