"""One optimizer step on one global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from hvd_lars.comm.base import Communicator
from hvd_lars.data import Request
from hvd_lars.data.randomness import seed_of
from hvd_lars.data.source import Batch
from hvd_lars.optim import Placement
from hvd_lars.state.run_state import RunState
from hvd_lars.train.feed import Feed
from hvd_lars.train.precision import LossScale, Precision, autocast
from hvd_lars.train.schedules import Schedule


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed.

    Attributes:
        seed: of dropout, with step and rank.
        label_smoothing: share of the target spread over all classes.
        precision: of forward and backward; ``fp16`` scales the loss.
        channels_last: give images to the model in that memory format.
        max_skipped_steps: steps in a row that may be skipped because a gradient is not finite.
    """

    seed: int = 0
    label_smoothing: float = 0.0
    precision: Precision = "fp32"
    channels_last: bool = False
    max_skipped_steps: int = 10


class Trainer:
    """One rank's part of every step.

    Args:
        state: model, optimizer with ``placement``, and average; on the feed's device.
        placement: sums the gradients.
        feed: this rank's micro-batches.
        schedule: the rate γ of every step.
        comm: the ranks.
        options: how a step is computed.
        forward: computes the model's logits, such as a compiled model; the model if None.
    """

    def __init__(
        self,
        state: RunState,
        placement: Placement,
        feed: Feed,
        schedule: Schedule,
        comm: Communicator,
        options: StepOptions | None = None,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if state.optimizer is None:
            raise ValueError("training needs an optimizer")
        self.state, self.placement, self.feed = state, placement, feed
        self.model, self.optimizer = state.model, state.optimizer
        self.schedule, self.comm, self.options = schedule, comm, options or StepOptions()
        self.watch = placement.gradients.watch
        self._forward = state.model if forward is None else forward
        channels_last = self.options.channels_last
        self._format = torch.channels_last if channels_last else torch.preserve_format
        self._buffers = list(state.model.buffers())
        self._buffers_before = [buffer.clone() for buffer in self._buffers]

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all ranks."""
        return self.feed.batches.global_batch

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale of the next step; None except in float16."""
        progress = self.state.progress
        if self.options.precision != "fp16":
            return None
        return LossScale.of(progress.loss_scale, progress.good_steps)

    def train_step(self, batches: Iterator[tuple[Request, Batch]]) -> Tensor:
        """Take one optimizer step; returns this rank's share of the loss, 0-dim float64.

        The loss is a sum over samples divided by the global batch, so that the sum of the ranks'
        gradients is the gradient of the mean, however unevenly the samples are spread.
        ``batches`` must be at the step's first micro-batch.
        """
        request, images, labels = self._next(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(request.step)
        self.optimizer.zero_grad()
        if self._buffers:
            torch._foreach_copy_(self._buffers_before, self._buffers)
        share = torch.zeros((), dtype=torch.float64, device=self.feed.device)
        torch.manual_seed(seed_of(self.options.seed, request.step, self.comm.rank))  # dropout's
        while True:
            if len(labels):
                share += self._accumulate(images, labels, request.last)
            if request.last:
                break
            request, images, labels = self._next(batches)
        self._step(share)
        average = self.state.average
        if average is not None and not self.optimizer.report.skipped:
            self.placement.complete_parameters()
            average.update_parameters(self.model)
        return share

    def _accumulate(self, images: Tensor, labels: Tensor, last: bool) -> Tensor:
        """Run forward and backward of a micro-batch; returns its share of the loss."""
        options, scale = self.options, self.loss_scale
        with self.watch.part("forward"), autocast(options.precision, self.feed.device):
            smoothing = options.label_smoothing
            logits = self._forward(images)
            total = functional.cross_entropy(
                logits, labels, reduction="sum", label_smoothing=smoothing
            )
            loss = total / self.global_batch
        sync = nullcontext() if last else self.placement.gradients.no_sync()
        with self.watch.part("backward"), sync:
            (loss * (1.0 if scale is None else scale.value)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _step(self, share: Tensor) -> None:
        """Step the optimizer; if a norm is not finite, all ranks skip the step.

        ``share`` is this rank's part of the loss.  In float16 a step that overflowed because the
        loss was scaled too far does not count among the skipped steps in a row.
        """
        scale = self.loss_scale
        with self.watch.part("optimizer"):
            self.optimizer.step(loss_scale=1.0 if scale is None else scale.value)
        skipped = self.optimizer.report.skipped
        if scale is None:
            self.state.step_taken(self.global_batch, skipped)
        else:
            excused = skipped and not scale.at_floor and not self._lost(share)
            value, good_steps = scale.after(skipped)
            self.state.step_taken(
                self.global_batch, skipped, excused, loss_scale=value, good_steps=good_steps
            )
        if skipped:  # undo the bad batch's effect on running statistics
            for buffer, before in zip(self._buffers, self._buffers_before, strict=True):
                buffer.copy_(before)

    def _lost(self, share: Tensor) -> bool:
        """Return whether any rank's unscaled loss is not finite; collective."""
        lost = (~share.isfinite()).double().cpu()
        self.comm.start_all_reduce_sum(lost, "lost").wait()
        return bool(lost)

    def _next(self, batches: Iterator[tuple[Request, Batch]]) -> tuple[Request, Tensor, Tensor]:
        """Return the next micro-batch on the device, ready for the model."""
        with self.watch.part("data"):
            request, (images, labels) = next(batches)
            if len(labels):
                images, labels = self.feed.source.on_device(images, labels, request)
                images = images.contiguous(memory_format=self._format)
            return request, images, labels
