"""Where gradients and optimizer state live; imports shard_plan, norms and comm.base.

Replicated, on 2 ranks with 2 buckets (each rank holds every parameter):

    backward:  … grad of the last layers ready → bucket 0 starts; … first layers → bucket 1 starts
    step:                │ rank 0: Σ² of ▓▓░░ ▓▓░░ │ sums over ranks │ rank 0: update ▓▓▓▓ ▓▓▓▓
    (sums are there)     │ rank 1: Σ² of ░░▓▓ ░░▓▓ │ 2·layers values │ rank 1: update ▓▓▓▓ ▓▓▓▓
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, final

import torch
from torch import Tensor, nn

from hvd_lars.comm.base import Communicator, Pending, check_reducible
from hvd_lars.optim.norms import is_dense
from hvd_lars.optim.shard_plan import fill_buckets, overlap, part_of


class Placement(Protocol):
    """What :class:`LARS` asks of the ranks around it."""

    def zero_gradients(self) -> None:
        """Begin a new accumulation window."""
        ...

    def reduce_gradients(self) -> None:
        """Return when every ``param.grad`` holds the sum over the ranks; again is a no-op."""
        ...

    def publish_parameters(self) -> None:
        """The step is done: give every rank the parameters that it updated."""
        ...

    def owned(self, param: Tensor) -> tuple[int, int]:
        """Begin and end, in memory order, of the elements whose squares this rank sums."""
        ...

    def complete_sums(self, sums: Tensor) -> Tensor:
        """Sum (n,) float64 over the ranks; the same bits on each."""
        ...


@dataclass(slots=True)
class _Bucket:
    """Gradients of some parameters in one piece of memory, reduced as one message."""

    params: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    missing: set[int] = field(default_factory=set)  # positions whose gradient is still to come
    pending: Pending | None = None


@final
class Replicated:
    """Every rank holds all parameters and momentum; gradients are all-reduced in flat buckets.

    ``param.grad`` are views of the buckets.  A bucket's all-reduce starts from a hook in backward
    as soon as it and those before it are full, in an order that is the same on all ranks: the
    reverse of the parameters', about that in which backward finishes them.  ``backward()`` returns
    when all are summed, so that clipping and ``torch.amp.GradScaler`` see the whole gradient; a
    rank that has no backward pass in a window joins in ``LARS.step``.  Gradients are summed, not
    averaged: scale each rank's loss by 1 / global batch.  A parameter that got no gradient in a
    window has a gradient of zero.

    Args:
        params: parameters to train; those that need no gradient are left out.
        comm: the ranks.
        bucket_bytes: most bytes of a bucket; a larger tensor has one of its own.

    Raises:
        ValueError: no parameter, or one that is not dense in memory.
        TypeError: a parameter's dtype cannot be summed over ranks.
    """

    _instances = itertools.count()  # all ranks make the same placements in the same order

    def __init__(
        self, params: Iterable[nn.Parameter], comm: Communicator, bucket_bytes: int = 25 * 2**20
    ) -> None:
        trained = [param for param in params if param.requires_grad]
        if not trained:
            raise ValueError("Replicated: no parameter requires a gradient")
        for param in trained:
            if not is_dense(param):
                raise ValueError(
                    f"Replicated: a parameter of shape {tuple(param.shape)} has strides "
                    f"{param.stride()}, which leave gaps in memory"
                )
        self._comm = comm
        self._name = f"gradients.{next(Replicated._instances)}"
        self._buckets = list(_make_buckets(trained, bucket_bytes))
        for bucket in self._buckets:
            check_reducible(bucket.flat, "gradients")
        self._place: dict[Tensor, tuple[_Bucket, int]] = {}
        self._owned: dict[Tensor, tuple[int, int]] = {}
        for bucket in self._buckets:
            begin, end = part_of(bucket.flat.numel(), comm.rank, comm.size)
            start = 0
            for i, param in enumerate(bucket.params):
                self._place[param] = (bucket, i)
                self._owned[param] = overlap(start, param.numel(), begin, end)
                start += param.numel()
                param.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        self._synchronizing = True
        self._reduced = False  # the gradients are sums already and wait for the step
        self.zero_gradients()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate: for all but a window's last micro-batch."""
        self._synchronizing = False
        try:
            yield
        finally:
            self._synchronizing = True

    def zero_gradients(self) -> None:
        """Zero the buckets and begin a new window."""
        for bucket in self._buckets:
            bucket.flat.zero_()
            for param, view in zip(bucket.params, bucket.views, strict=True):
                param.grad = view
        self._begin_window()

    def reduce_gradients(self) -> None:
        """Start the buckets that backward did not fill, then wait for all of them."""
        if self._reduced:
            return
        for bucket in self._buckets[self._next :]:
            for i, param in enumerate(bucket.params):
                self._adopt(bucket, i, param)
        while self._next < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            assert bucket.pending is not None
            bucket.pending.wait()
            bucket.pending = None
        self._begin_window()
        self._reduced = True

    def publish_parameters(self) -> None:
        """Every rank has updated every parameter: only the window ends."""
        self._reduced = False

    def owned(self, param: Tensor) -> tuple[int, int]:
        """This rank's elements of ``param``; ValueError where it is not among the parameters."""
        if param not in self._owned:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} is in the optimizer but not in its "
                f"placement"
            )
        return self._owned[param]

    def complete_sums(self, sums: Tensor) -> Tensor:
        """Sum over the ranks in place and return ``sums``."""
        self._comm.start_all_reduce_sum(sums, f"{self._name}.sums_of_squares").wait()
        return sums

    def _begin_window(self) -> None:
        self._next = 0  # the first bucket that was not started yet
        self._reduced = False
        self._callback_queued = False
        for bucket in self._buckets:
            bucket.missing = set(range(len(bucket.params)))

    def _on_gradient(self, param: Tensor) -> None:
        """Autograd's hook: the gradient of ``param`` for this backward pass is complete."""
        bucket, i = self._place[param]
        if self._reduced or bucket.pending is not None:
            raise RuntimeError(
                "a gradient arrived after those of its step were summed over the ranks: wrap all "
                "but the last backward of a step in placement.no_sync(), and begin the next step "
                "with optimizer.zero_grad()"
            )
        self._adopt(bucket, i, param)
        if not self._synchronizing:
            return
        if not self._callback_queued:
            self._callback_queued = True
            engine = torch.autograd.Variable._execution_engine  # as FSDP does
            engine.queue_callback(self.reduce_gradients)
        bucket.missing.discard(i)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._next]
        bucket.pending = self._comm.start_all_reduce_sum(bucket.flat, f"{self._name}.{self._next}")
        self._next += 1

    @staticmethod
    def _adopt(bucket: _Bucket, i: int, param: Tensor) -> None:
        """Make ``param.grad`` the bucket's view again where somebody replaced it or set None."""
        view = bucket.views[i]
        if param.grad is view:
            return
        if param.grad is None:
            view.zero_()
        elif param.grad.data_ptr() != view.data_ptr() or param.grad.stride() != view.stride():
            if param.grad.is_sparse:
                raise RuntimeError(
                    f"gradients are reduced dense; a parameter of shape {tuple(param.shape)} has "
                    f"a sparse one"
                )
            view.copy_(param.grad)
        param.grad = view


def _make_buckets(params: list[nn.Parameter], bucket_bytes: int) -> Iterator[_Bucket]:
    """Buckets in reverse order of the parameters, one dtype and device each."""
    kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for param in reversed(params):
        kinds.setdefault((param.dtype, param.device), []).append(param)
    for (dtype, device), members in kinds.items():
        sizes = [param.numel() * param.element_size() for param in members]
        for positions in fill_buckets(sizes, bucket_bytes):
            inside = [members[p] for p in positions]
            flat = torch.zeros(sum(p.numel() for p in inside), dtype=dtype, device=device)
            views, start = [], 0
            for param in inside:
                views.append(flat.as_strided(param.shape, param.stride(), start))
                start += param.numel()
            yield _Bucket(inside, flat, views)
