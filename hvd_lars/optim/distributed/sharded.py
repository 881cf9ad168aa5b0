"""The placement in which each rank updates 1 / size of everything.

On 2 ranks with one bucket of two layers, the second across the border:

    parameters      ▓▓▓▓▓▓▓▓▒▒▒▒│▒▒▒▒▒▒▒▒▒▒▒▒    both ranks hold all of them
    backward:       reduce-scatter of the gradients
    rank 0 holds    ▓▓▓▓▓▓▓▓▒▒▒▒                 sums of its part, sums Σ² of both layers' shares
    rank 1 holds                 ▒▒▒▒▒▒▒▒▒▒▒▒    sums of its part, sums Σ² of its share
    step:           2·layers values summed over the ranks; each updates its part
    publish:        all-gather of the parameters, in place; optionally during the next forward
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from hvd_lars.comm.base import Communicator, Pending
from hvd_lars.comm.step_scalars import StepScalars
from hvd_lars.optim.distributed.buckets import GradientBuckets
from hvd_lars.optim.distributed.early_norms import EarlyNorms
from hvd_lars.optim.distributed.forward_reads import ForwardReads
from hvd_lars.optim.distributed.placement import check_placed, check_unmoved
from hvd_lars.optim.distributed.shard_plan import overlap
from hvd_lars.optim.norms import flat
from hvd_lars.runtime.stopwatch import Stopwatch


@dataclass(slots=True)
class _Share:
    """This rank's part of a parameter."""

    begin: int  # elements of the parameter, in memory order
    end: int
    weight: Tensor  # (end - begin,), a view of the parameter's own memory
    gradient: Tensor  # (end - begin,)
    whole: Tensor  # the parameter's view of its bucket


@final
class _ReduceScatter:
    """Sums a bucket into this rank's shard of it."""

    in_place = False

    def __init__(self, comm: Communicator, name: str) -> None:
        self.multiple = comm.size
        self._comm, self._name = comm, name
        self._shards: dict[int, Tensor] = {}

    def shard(self, b: int, flat: Tensor) -> Tensor:
        """Return the memory of this rank's sums of the bucket: (numel / size,)."""
        if b not in self._shards:
            self._shards[b] = flat.new_zeros(flat.numel() // self.multiple)
        return self._shards[b]

    def start(self, b: int, flat: Tensor) -> Pending:
        return self._comm.start_reduce_scatter_sum(flat, self.shard(b, flat), f"{self._name}.{b}")


@final
class Sharded:
    """Every rank holds the parameters; momentum and the update are divided evenly over the ranks.

    Gradients are reduce-scattered during backward in flat buckets, padded to a multiple of the
    world size (:class:`GradientBuckets`); layers may cross the borders.  After the step the
    parameters are all-gathered.  The bytes sent are those of an all-reduce; a rank's momentum and
    update time are 1 / size of the whole.  Once summed, ``param.grad`` cannot be read, since no
    rank holds the whole gradient: clipping by norm and ``torch.amp.GradScaler`` need
    :class:`Replicated`.

    The parameters' memory moves into the buckets: make the placement after the model is on its
    device, and before anything keeps a reference to ``param.data``.  ``LARS.state_dict`` holds this
    rank's part of the momentum; :meth:`LARS.momentum` returns whole tensors.

    Args:
        params: parameters to train; those that need no gradient are omitted.
        comm: the ranks.
        bucket_bytes: maximum bytes of a bucket; a larger tensor gets its own bucket.
        early_norms: sum the squares of each bucket as its reduction completes.
        root: rank whose parameters are broadcast to all; None if they are already equal, or will be
            before the first step.
        watch: its part "communication" is the time spent waiting for other ranks.

    Raises:
        ValueError: there is no parameter; one is not dense in memory or already in a placement; or
            the ranks' parameters differ in shape, strides, dtype or order (raised on every rank).
        TypeError: a parameter's dtype cannot be summed over ranks.

    Source:
        Rajbhandari et al. 2020, arXiv 1910.02054 (stage 1), with norms of whole layers.
    """

    _instances = itertools.count()  # all ranks make the same placements in the same order

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        comm: Communicator,
        bucket_bytes: int = 25 * 2**20,
        early_norms: bool = False,
        root: int | None = 0,
        watch: Stopwatch | None = None,
    ) -> None:
        self._comm = comm
        # Use rank 0's count: a rank that joined later has made fewer.
        self._name = f"shards.{comm.broadcast_object(next(Sharded._instances))}"
        watch = watch or Stopwatch()
        self.early = EarlyNorms(self._norm_parts) if early_norms else None
        self.scalars = StepScalars(comm, f"{self._name}.sums_of_squares", watch)
        reduction = _ReduceScatter(comm, f"{self._name}.gradients")
        self.gradients = GradientBuckets(
            params,
            comm,
            bucket_bytes,
            reduction,
            watch,
            None if self.early is None else self.early.on_reduced,
        )
        if root is not None:
            self.gradients.broadcast_parameters(root)
        self._weights: list[Tensor] = []  # by bucket: (numel,), all parameters
        self._shares: dict[Tensor, _Share] = {}
        self._gathering: dict[int, Pending] = {}  # by bucket
        self._reads: ForwardReads | None = None
        for b, bucket in enumerate(self.gradients.buckets):
            weights = torch.zeros_like(bucket.flat)
            part = weights.numel() // comm.size
            shard = reduction.shard(b, bucket.flat)
            first = comm.rank * part
            for param, start in zip(bucket.params, bucket.starts, strict=True):
                view = weights.as_strided(param.shape, param.stride(), start)
                param.data = view.copy_(param.detach())
                begin, end = overlap(start, param.numel(), first, first + part)
                self._shares[param] = _Share(
                    begin,
                    end,
                    weights[start + begin : start + end],
                    shard[start + begin - first : start + end - first]
                    if begin < end
                    else shard[:0],
                    view,
                )
            self._weights.append(weights)

    def gather_during_forward(self, model: nn.Module) -> None:
        """Return from a step at once, and wait for parameters before the part that reads them.

        The parts are known after the first forward.  Call :meth:`complete_parameters` before
        reading parameters other than by calling ``model``.  Not for models run by
        ``torch.compile``.
        """
        self._reads = ForwardReads(model, self._complete)

    def publish_parameters(self) -> None:
        """All-gather every bucket's parameters in place, those that forward reads first, first."""
        with self.gradients.watch.part("communication"):
            for b in reversed(range(len(self._weights))):
                name = f"{self._name}.parameters.{b}"
                self._gathering[b] = self._comm.start_all_gather(self._weights[b], name)
        for param in self._shares:  # autograd does not see the gather's writes
            torch.autograd.graph.increment_version(param)
        self.gradients.end_step()
        if self._reads is None or not self._reads.learn():
            self.complete_parameters()

    def complete_parameters(self) -> None:
        """Wait until every parameter is whole."""
        self._complete(self._shares)

    def _complete(self, params: Iterable[Tensor]) -> None:
        if not self._gathering:
            return
        with self.gradients.watch.part("communication"):
            for param in params:
                place = self.gradients.place.get(param)
                gathering = None if place is None else self._gathering.pop(place[0], None)
                if gathering is not None:
                    gathering.wait()

    def block(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the parameter and of its summed gradient."""
        share = self._shares[param]
        moved = param.data_ptr() != share.whole.data_ptr()
        check_unmoved(param, share.whole, moved)
        return share.weight, share.gradient

    def norm_part(self, param: Tensor) -> tuple[int, int]:
        """Return all of this rank's part; ValueError if it is not in the placement."""
        check_placed(param, self._shares)
        share = self._shares[param]
        return 0, share.end - share.begin

    def whole(self, param: Tensor, part: Tensor) -> Tensor:
        """Return the ranks' parts joined; collective."""
        share = self._shares[param]
        everything = part.new_zeros(param.numel())
        everything[share.begin : share.end] = flat(part)
        self._comm.start_all_reduce_sum(everything, f"{self._name}.whole").wait()
        return everything.as_strided(param.shape, param.stride())

    def part(self, param: Tensor, whole: Tensor) -> Tensor:
        """Return this rank's part of ``whole``, which has the parameter's shape."""
        share = self._shares[param]
        laid_out = torch.empty_like(param, dtype=whole.dtype).copy_(whole)
        if share.end - share.begin == param.numel():
            return laid_out
        return flat(laid_out)[share.begin : share.end].clone()

    def _norm_parts(self, b: int) -> list[Tensor]:
        return [self._shares[param].gradient for param in self.gradients.buckets[b].params]
