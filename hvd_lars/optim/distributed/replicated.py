"""The placement in which every rank holds everything.

On 2 ranks with 2 buckets:

    backward:  … grad of the last layers ready → bucket 0 starts; … first layers → bucket 1 starts
    step:                │ rank 0: Σ² of ▓▓░░ ▓▓░░ │ sums over ranks │ rank 0: update ▓▓▓▓ ▓▓▓▓
    (sums are there)     │ rank 1: Σ² of ░░▓▓ ░░▓▓ │ 2·layers values │ rank 1: update ▓▓▓▓ ▓▓▓▓
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import final

from torch import Tensor, nn

from hvd_lars.comm.base import Communicator, Pending, Reducer
from hvd_lars.comm.step_scalars import StepScalars
from hvd_lars.optim.distributed.buckets import GradientBuckets
from hvd_lars.optim.distributed.early_norms import EarlyNorms
from hvd_lars.optim.distributed.placement import check_placed, check_unmoved
from hvd_lars.optim.distributed.shard_plan import overlap, part_of
from hvd_lars.optim.norms import flat
from hvd_lars.runtime.stopwatch import Stopwatch


@final
class _AllReduce:
    """Sums a bucket in its own memory."""

    multiple, in_place = 1, True

    def __init__(self, reducer: Reducer, name: str) -> None:
        self._reducer, self._name = reducer, name

    def start(self, b: int, flat: Tensor) -> Pending:
        return self._reducer.start_all_reduce_sum(flat, f"{self._name}.{b}")


@final
class Replicated:
    """Every rank holds all parameters and momentum; gradients are all-reduced in flat buckets.

    ``param.grad`` are views of the buckets.  A bucket's all-reduce starts in backward as soon as it
    is full (:class:`GradientBuckets` defines the order).  ``backward()`` returns when all are
    summed, so that clipping and ``torch.amp.GradScaler`` see the whole gradient; a rank without a
    backward pass in a window joins in ``LARS.step``.  Gradients are summed, not averaged: scale
    each rank's loss by 1 / global batch.  A parameter without a gradient in a window has a gradient
    of zero.

    Args:
        params: parameters to train; those that need no gradient are omitted.
        comm: the ranks.
        bucket_bytes: maximum bytes of a bucket; a larger tensor gets its own bucket.
        early_norms: sum the squares of each bucket as its reduction completes, which saves the step
            one read of the gradients.  Nothing may edit gradients between backward and step: torch
            does not count the edits of ``GradScaler``.
        gradients_through: sums the buckets in place of ``comm``, such as a CompressedReducer.
        root: rank whose parameters are broadcast to all; None if they are already equal, or will be
            before the first step.
        watch: its part "communication" is the time spent waiting for other ranks.

    Raises:
        ValueError: there is no parameter; one is not dense in memory or already in a placement; or
            the ranks' parameters differ in shape, strides, dtype or order (raised on every rank).
        TypeError: a parameter's dtype cannot be summed over ranks.
    """

    _instances = itertools.count()  # all ranks make the same placements in the same order

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        comm: Communicator,
        bucket_bytes: int = 25 * 2**20,
        early_norms: bool = False,
        gradients_through: Reducer | None = None,
        root: int | None = 0,
        watch: Stopwatch | None = None,
    ) -> None:
        # Use rank 0's count: a rank that joined later has made fewer.
        name = f"gradients.{comm.broadcast_object(next(Replicated._instances))}"
        watch = watch or Stopwatch()
        self.early = EarlyNorms(self._norm_parts) if early_norms else None
        self.scalars = StepScalars(comm, f"{name}.sums_of_squares", watch)
        self.gradients = GradientBuckets(
            params,
            comm,
            bucket_bytes,
            _AllReduce(gradients_through or comm, name),
            watch,
            None if self.early is None else self.early.on_reduced,
        )
        if root is not None:
            self.gradients.broadcast_parameters(root)
        self._owned: dict[Tensor, tuple[int, int]] = {}
        for bucket in self.gradients.buckets:
            begin, end = part_of(bucket.flat.numel(), comm.rank, comm.size)
            for param, start in zip(bucket.params, bucket.starts, strict=True):
                self._owned[param] = overlap(start, param.numel(), begin, end)

    def publish_parameters(self) -> None:
        """End the window; every rank has updated every parameter."""
        self.gradients.end_step()

    def complete_parameters(self) -> None:
        """Do nothing: all parameters are complete."""

    def block(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Return the whole parameter and its gradient, in memory order."""
        b, i = self.gradients.place[param]
        view = self.gradients.buckets[b].views[i]
        check_unmoved(param, view, moved=False)
        return flat(param), flat(view)

    def norm_part(self, param: Tensor) -> tuple[int, int]:
        """Return this rank's share of ``param``; ValueError if it is not in the placement."""
        check_placed(param, self._owned)
        return self._owned[param]

    def whole(self, param: Tensor, part: Tensor) -> Tensor:
        """Return ``part`` itself, which is the whole."""
        return part.view_as(param)

    def part(self, param: Tensor, whole: Tensor) -> Tensor:
        """Return ``whole`` itself."""
        return whole

    def _norm_parts(self, b: int) -> list[Tensor]:
        bucket = self.gradients.buckets[b]
        return [
            bucket.flat[start + begin : start + end]
            for start, (begin, end) in zip(
                bucket.starts, (self._owned[param] for param in bucket.params), strict=True
            )
        ]
