"""Gradients in flat buckets, each reduced as soon as backward has filled it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, final

import torch
from torch import Tensor, nn

from hvd_lars.comm.base import Communicator, Pending, check_reducible
from hvd_lars.optim.distributed.absent import AbsentGradient
from hvd_lars.optim.distributed.bucket import Bucket, adopt, make_buckets
from hvd_lars.optim.distributed.layout import check_same_layout
from hvd_lars.optim.distributed.local_norms import LocalNorms
from hvd_lars.optim.norms import is_dense
from hvd_lars.runtime.stopwatch import Stopwatch
from hvd_lars.runtime.torch_internals import at_end_of_backward, enclosing_node

_LATE = (
    "a gradient arrived after those of its step were summed over the ranks: wrap all but the last "
    "backward of a step in placement.gradients.no_sync(), and begin the next step with "
    "optimizer.zero_grad()"
)
_UNZEROED = (
    "backward() before optimizer.zero_grad(): it added to gradients that were summed over the "
    "ranks for the last step"
)


class Reduction(Protocol):
    """A way to sum buckets over the ranks.

    Attributes:
        multiple: buckets are padded to a multiple of this many elements.
        in_place: the collective leaves the sums in the bucket; otherwise ``param.grad`` is an
            :class:`AbsentGradient` until the step.
    """

    multiple: int
    in_place: bool

    def start(self, b: int, flat: Tensor) -> Pending:
        """Start the collective of the bucket at position ``b``, whose memory is ``flat``."""
        ...


@final
class GradientBuckets:
    """Collects ``param.grad`` as views of flat buckets and starts a collective for each full one.

    A hook in backward starts a bucket as soon as it and all buckets before it are full.  The order
    is the same on all ranks: the reverse of the parameters', roughly the order in which backward
    finishes them.  ``backward()`` returns when all are complete; a rank without a backward pass in
    a window joins in :meth:`finish`.

    Args:
        params: parameters to train; those that need no gradient are omitted.
        bucket_bytes: maximum bytes of a bucket; a larger tensor gets its own bucket.
        comm: the ranks.
        reduction: sums a bucket over the ranks.
        watch: its part "communication" is the time spent waiting for other ranks.
        on_reduced: called with each bucket's position and memory once it is summed, in order.

    Raises:
        ValueError: there is no parameter; one is not dense in memory or already in a placement; or
            the ranks' parameters differ in shape, strides, dtype or order (raised on every rank).
        TypeError: a parameter's dtype cannot be summed over ranks.
    """

    _alive: ClassVar[weakref.WeakSet[GradientBuckets]] = weakref.WeakSet()

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        comm: Communicator,
        bucket_bytes: int,
        reduction: Reduction,
        watch: Stopwatch | None = None,
        on_reduced: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        trained = list(dict.fromkeys(p for p in params if p.requires_grad))  # tied ones once
        if not trained:
            raise ValueError("no parameter requires a gradient")
        for param in trained:
            if not is_dense(param):
                raise ValueError(
                    f"a parameter of shape {tuple(param.shape)} has strides {param.stride()}, "
                    f"which leave gaps in memory"
                )
        if (twice := placed_already(trained)) is not None:
            raise ValueError(
                f"a parameter of shape {tuple(twice.shape)} is in another placement already: each "
                f"optimizer has a placement of its own, of its own parameters"
            )
        check_same_layout(trained, comm)
        self.buckets = list(make_buckets(trained, bucket_bytes, reduction.multiple))
        self.place: dict[Tensor, tuple[int, int]] = {}  # bucket and position in it
        handles = []
        for b, bucket in enumerate(self.buckets):
            check_reducible(bucket.flat, "gradients")
            for i, param in enumerate(bucket.params):
                self.place[param] = (b, i)
                hook = _hook_of(self, b, i)
                handles.append(param.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            if not reduction.in_place:
                bucket.absent = [view.as_subclass(AbsentGradient) for view in bucket.views]
        weakref.finalize(self, _remove, handles)
        self._alive.add(self)
        self._comm, self._reduction, self._in_place = comm, reduction, reduction.in_place
        self._on_reduced = on_reduced
        self._synchronizing, self._used, self._spent = True, False, False
        self.steps = 0  # steps that have used the sums
        self.local = LocalNorms()
        self.watch = watch or Stopwatch()
        self.zero()

    @torch.no_grad()
    def broadcast_parameters(self, root: int) -> None:
        """Overwrite every rank's parameters with rank ``root``'s, through the buckets' memory."""
        if self._comm.size == 1:
            return
        for bucket in self.buckets:
            for param, view in zip(bucket.params, bucket.views, strict=True):
                view.copy_(param)
            self._comm.broadcast(bucket.flat, root)
            for param, view in zip(bucket.params, bucket.views, strict=True):
                param.copy_(view)
            bucket.flat.zero_()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Only accumulate in backward passes inside; for all but a window's last micro-batch."""
        self._synchronizing = False
        try:
            yield
        finally:
            self._synchronizing = True

    def zero(self) -> None:
        """Begin a new window.

        Gradients are None until backward sets them to tensors of its own; copying those moves fewer
        bytes than zeroing a bucket and adding to it.
        """
        for bucket in self.buckets:
            if bucket.pending is not None:  # left by a backward pass that failed
                bucket.pending.wait()
                bucket.pending = None
        self._forget_gradients()
        self._begin_window()
        self._reduced = self._used = False

    def finish(self) -> None:
        """Start the buckets that backward did not fill, then complete all of them in order.

        Raises:
            RuntimeError: a step has already used the gradients, or one was replaced after they
                were summed.
        """
        if self._reduced:
            self._check_not_replaced()
            return
        if self._used and (not self._in_place or self._holds_views()):
            raise RuntimeError(
                "step() without a backward pass since the last one: it was called twice, or by "
                "two optimizers over one placement; a window begins with optimizer.zero_grad()"
            )
        self._check_alone()
        for bucket in self.buckets[self._next :]:
            for i, param in enumerate(bucket.params):
                self._check_fresh(bucket, i, param)
        with self.watch.part("communication"):
            while self._next < len(self.buckets):
                self._start_next()
            self._complete(only_done=False)
        if not self._in_place:
            for bucket in self.buckets:
                for param, absent in zip(bucket.params, bucket.absent, strict=True):
                    param.grad = absent
        self._begin_window()
        self._reduced, self._used, self._spent = True, False, False

    def end_step(self) -> None:
        """Mark the sums as used by a step."""
        if not self._in_place:
            self._forget_gradients()
        self._reduced, self._used, self._spent = False, True, True
        self.steps += 1

    def _check_alone(self) -> None:
        """Raise RuntimeError if this rank joins without a backward pass beside other placements.

        The others' backward pass reduces the placements in an order that it cannot know.
        """
        ready = self._callback_queued or any(bucket.fresh for bucket in self.buckets)
        if ready or self._comm.size == 1:
            return
        if _in_window(self):
            gc.collect()  # a dropped placement is part of a reference cycle
            if _in_window(self):
                raise RuntimeError(
                    "this rank had no backward pass in this step, and there are several placements,"
                    " whose sums over the ranks it could mix up: run backward on every rank, on "
                    "0 × loss where there are no samples"
                )

    def _holds_views(self) -> bool:
        return any(
            param.grad is view
            for bucket in self.buckets
            for param, view in zip(bucket.params, bucket.views, strict=True)
        )

    def _check_not_replaced(self) -> None:
        for bucket in self.buckets:
            ours = bucket.views if self._in_place else bucket.absent
            for param, gradient in zip(bucket.params, ours, strict=True):
                if param.grad is not gradient:
                    raise RuntimeError(
                        f"param.grad of a parameter of shape {tuple(param.shape)} was "
                        f"{'set to None' if param.grad is None else 'replaced'} after backward had "
                        f"summed it over the ranks: to drop the step call optimizer.zero_grad(); "
                        + (
                            "to change it write into it in place"
                            if self._in_place
                            else "no rank holds the whole gradient under Sharded; use Replicated"
                        )
                    )

    def _forget_gradients(self) -> None:
        for bucket in self.buckets:
            for param in bucket.params:
                param.grad = None

    def _begin_window(self) -> None:
        self._next = 0  # the first bucket not yet started
        self._completed = 0
        self._callback_queued = False
        for bucket in self.buckets:
            bucket.missing = set(range(len(bucket.params)))
            bucket.fresh.clear()
            bucket.waiting, bucket.waiting_bytes = [], 0

    def _on_gradient(self, b: int, i: int, param: Tensor) -> None:
        """Take the gradient of ``param``, complete for this backward pass; autograd's hook.

        Args:
            b: position of its bucket.
            i: position in the bucket.
            param: the parameter.
        """
        bucket = self.buckets[b]
        self._check_fresh(bucket, i, param)
        if b < self._next:
            raise RuntimeError(_LATE)
        self._used = self._reduced = False
        bucket.fresh.add(i)
        bucket.waiting.append(i)
        bucket.waiting_bytes += bucket.sizes[i]
        if bucket.waiting_bytes > bucket.together or not self._synchronizing:
            adopt(bucket, bucket.waiting)
        if self._synchronizing:
            bucket.missing.discard(i)
            self._start_full()

    def take(self, params: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Take gradients that were computed in a backward pass beside autograd's hooks.

        They are added to ``param.grad``, as autograd does, and may be overwritten afterwards.

        Args:
            params: parameters of the placement.
            gradients: of their shapes; None where there is none.
        """
        first: tuple[list[Tensor], list[Tensor]] = [], []
        more: tuple[list[Tensor], list[Tensor]] = [], []
        for param, gradient in zip(params, gradients, strict=True):
            if gradient is None:
                continue
            b, i = self.place[param]
            bucket = self.buckets[b]
            self._check_fresh(bucket, i, param)
            if b < self._next:
                raise RuntimeError(_LATE)
            view, held = bucket.views[i], param.grad
            if held is not None and held is not view:
                adopt(bucket, [*bucket.waiting, i])
            views, given = first if held is None else more
            views.append(view)
            given.append(gradient)
            param.grad = view
            bucket.fresh.add(i)
            if self._synchronizing:
                bucket.missing.discard(i)
        with torch.no_grad():
            if first[0]:
                torch._foreach_copy_(*first)
            if more[0]:
                torch._foreach_add_(*more)
        self._used = self._reduced = False
        if self._synchronizing:
            self._start_full()

    def _start_full(self) -> None:
        """Start the buckets that are full, in order; backward then ends with :meth:`finish`."""
        if not self._callback_queued:
            self._finish_at_end()
        while self._next < len(self.buckets) and not self.buckets[self._next].missing:
            with self.watch.part("communication"):
                self._start_next()
                self._complete(only_done=True)

    def _finish_at_end(self) -> None:
        self._callback_queued = True
        at_end_of_backward(self._at_end)

    def _at_end(self) -> None:
        """Finish at the end of the outermost backward: a reentrant checkpoint runs one inside."""
        if (outer := enclosing_node()) is None:
            self.finish()
            return
        self._callback_queued = False
        outer.register_hook(lambda *_: None if self._callback_queued else self._finish_at_end())

    def _check_fresh(self, bucket: Bucket, i: int, param: Tensor) -> None:
        """Raise RuntimeError if ``param.grad`` contains sums of an earlier window."""
        gradient = param.grad
        stale = gradient is bucket.views[i] or type(gradient) is AbsentGradient
        if stale and i not in bucket.fresh:
            raise RuntimeError(_UNZEROED if self._spent else _LATE)

    def note_local(self) -> None:
        """Give ``local`` the gradients accumulated so far, of this rank alone."""
        for b, bucket in enumerate(self.buckets):
            self.local.note(b, bucket.views, bucket.fresh)

    def _start_next(self) -> None:
        bucket = self.buckets[self._next]
        with torch.no_grad():
            adopt(bucket, range(len(bucket.params)))
        self.local.note(self._next, bucket.views, range(len(bucket.views)))
        bucket.pending = self._reduction.start(self._next, bucket.flat)
        self._next += 1

    def _complete(self, only_done: bool) -> None:
        """Wait for started buckets in order."""
        while self._completed < self._next:
            bucket = self.buckets[self._completed]
            assert bucket.pending is not None
            if only_done and not bucket.pending.done():
                return
            bucket.pending.wait()
            bucket.pending = None
            if self._on_reduced is not None:
                self._on_reduced(self._completed, bucket.flat)
            self._completed += 1


def placed_already(params: Sequence[Tensor]) -> Tensor | None:
    """Return the first parameter that is in a live placement, or None."""
    found = _placed(params)
    if found is not None:
        gc.collect()  # a dropped placement is part of a reference cycle
        found = _placed(params)
    return found


def _placed(params: Sequence[Tensor]) -> Tensor | None:
    places = [buckets.place for buckets in GradientBuckets._alive]
    return next((p for p in params for place in places if p in place), None)


def _in_window(buckets: GradientBuckets) -> list[GradientBuckets]:
    """Return the other placements over the same ranks that wait for gradients, too."""
    return [
        each
        for each in GradientBuckets._alive
        if each is not buckets and each._comm is buckets._comm and not (each._reduced or each._used)
    ]


def _hook_of(buckets: GradientBuckets, b: int, i: int) -> Callable[[Tensor], None]:
    """Return a parameter's hook for autograd, which does not keep an unused placement alive."""
    reference = weakref.ref(buckets)

    def hook(param: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive._on_gradient(b, i, param)

    return hook


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()
