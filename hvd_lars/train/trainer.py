"""One optimizer step on one global batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hvd_lars.comm.base import Communicator
from hvd_lars.data.randomness import seed_of
from hvd_lars.data.source import Batch, Request
from hvd_lars.optim import Placement
from hvd_lars.optim.device_step import StepReport
from hvd_lars.runtime.device import seed_generators
from hvd_lars.runtime.readback import Readback
from hvd_lars.state.run_state import RunState
from hvd_lars.train.feed import Feed
from hvd_lars.train.kept_buffers import KeptBuffers
from hvd_lars.train.noise_scale import Noise, NoiseProbe
from hvd_lars.train.precision import LossScale, Precision, autocast, scale_after
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
        noise_every: steps between estimates of the gradient noise scale; 0 for none.
        read_late: read the outcome of a step after the next one is queued, so that the device
            never waits for the host.
    """

    seed: int = 0
    label_smoothing: float = 0.0
    precision: Precision = "fp32"
    channels_last: bool = False
    max_skipped_steps: int = 10
    noise_every: int = 0
    read_late: bool = False


class Outcome(NamedTuple):
    """A step that was taken, as read from the device.

    Attributes:
        step: its number, from 1.
        skipped: whether it was skipped, on all ranks alike.
        report: its norms.
        scalars: the values that others added to ``placement.scalars``, summed over the ranks, (n,)
            float64; None if there were none.
        noise: estimates of the gradient noise scale, if this step was to have them.
    """

    step: int
    skipped: bool
    report: StepReport
    scalars: Tensor | None
    noise: Noise | None = None


class _Unread(NamedTuple):
    """A step whose values are on their way, and which are among them."""

    step: int
    report: StepReport
    has_added: bool
    has_noise: bool
    values: Readback


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
        self._buffers = KeptBuffers(state.model)
        self._scale: Tensor | None = None  # value and good steps, (2,) float64; in float16 only
        self._unread: deque[_Unread] = deque()
        every = self.options.noise_every
        self._noise = NoiseProbe(placement, comm, self.global_batch, every)
        self._read: deque[Outcome] = deque(maxlen=2)  # a caller may never ask

    @property
    def global_batch(self) -> int:
        """Samples of a step, over all ranks."""
        return self.feed.batches.global_batch

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale after the steps read so far; None except in float16."""
        progress = self.state.progress
        if self.options.precision != "fp16":
            return None
        return LossScale.of(progress.loss_scale, progress.good_steps)

    def train_step(self, batches: Iterator[tuple[Request, Batch]]) -> Tensor:
        """Take one optimizer step; returns this rank's share of the loss, 0-dim float64.

        The loss is a sum over samples divided by the global batch, so that the sum of the ranks'
        gradients is the gradient of the mean, however unevenly the samples are spread.
        ``batches`` must be at the step's first micro-batch.  If a norm is not finite, all ranks
        skip the step, which the device decides: the share is then 0, and :meth:`outcomes` tells.
        """
        request, images, labels = self._next(batches)
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(request.step)
        self.optimizer.zero_grad()
        self._noise.begin(request.step + 1)
        self._buffers.note()
        scale = self.loss_scale
        if scale is not None and not self._unread:
            self._scale = scale.on(self.feed.device)
        share = torch.zeros((), dtype=torch.float64, device=self.feed.device)
        seed = seed_of(self.options.seed, request.step, self.comm.rank)  # dropout's
        seed_generators(seed, self.feed.device)
        while True:
            if len(labels):
                share += self._accumulate(images, labels, request.last)
                self._noise.micro_batch_done(len(request.indices), request.last)
            if request.last:
                break
            request, images, labels = self._next(batches)
        kept = self._step(share)
        self._buffers.restore_unless(kept)  # the bad batch's effect on running statistics
        if self.state.average is not None:
            self.placement.complete_parameters()
            self.state.average.follow(self.model, kept)
        while len(self._unread) > self.options.read_late:
            self._read_one()
        return torch.where(kept, share, 0.0)

    def outcomes(self, wait: bool = False) -> Iterator[Outcome]:
        """Yield the outcomes of steps that were read since the last call, in order.

        Args:
            wait: for those of all steps taken; ``state.progress`` is complete in the end.
        """
        while self._read or (wait and self._unread):
            if not self._read:
                self._read_one()
            yield self._read.popleft()

    def _accumulate(self, images: Tensor, labels: Tensor, last: bool) -> Tensor:
        """Run forward and backward of a micro-batch; returns its share of the loss."""
        options, scale = self.options, self._scale
        with self.watch.part("forward"), autocast(options.precision, self.feed.device):
            smoothing = options.label_smoothing
            logits = self._forward(images)
            total = functional.cross_entropy(
                logits, labels, reduction="sum", label_smoothing=smoothing
            )
            loss = total / self.global_batch
        sync = nullcontext() if last else self.placement.gradients.no_sync()
        with self.watch.part("backward"), sync:
            (loss if scale is None else loss * scale[0]).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _step(self, share: Tensor) -> Tensor:
        """Step the optimizer; returns whether the step was kept, a 0-dim bool on the device."""
        scalars, scale = self.placement.scalars, self._scale
        if self._noise.measuring:  # a rank without samples has not joined the others yet
            self.placement.complete_parameters()
            self.placement.gradients.finish()
        noise = self._noise.values(None if scale is None else scale[0])
        if noise is not None:
            scalars.add(noise)
        if scale is not None:
            scalars.add((~share.isfinite()).double()[None])
        with self.watch.part("optimizer"):
            self.optimizer.step(loss_scale=1.0 if scale is None else scale[0])
        report, summed = self.optimizer.report, scalars.take()
        kept = report.finite
        if kept is None:
            kept = torch.ones((), dtype=torch.bool, device=share.device)
        kept = kept.to(share.device)
        found = [kept.double()[None]] if summed is None else [kept.double()[None], summed]
        if scale is not None:
            self._scale = scale_after(scale, kept)
            found += [scale[:1], self._scale]
        self.state.step_taken(self.global_batch)
        step = self.state.progress.step
        unread = _Unread(
            step, report, summed is not None, noise is not None, Readback(torch.cat(found))
        )
        self._unread.append(unread)
        return kept

    def _read_one(self) -> None:
        """Read the outcome of the oldest unread step.

        In float16 a step that overflowed because the loss was scaled too far does not count among
        the skipped steps in a row.
        """
        step, report, has_added, has_noise, values = self._unread.popleft()
        kept, *rest = values.read()
        skipped, excused, scale = not kept, False, {}
        if self._scale is not None:
            *rest, before, after, good_steps = rest
            lost = bool(rest.pop()) if has_added else False
            excused = skipped and not lost and not LossScale(before).at_floor
            scale = {"loss_scale": after, "good_steps": int(good_steps)}
        self.state.step_settled(skipped, excused, **scale)
        noise = None
        if has_noise and has_added:
            count = self._noise.num_values
            noise = self._noise.estimate(rest[-count:], report)
            rest = rest[:-count]
        if noise is not None:
            self.state.noise_estimated(noise.trace, noise.signal)
        asked = torch.tensor(rest, dtype=torch.float64) if rest else None
        self._read.append(Outcome(step, skipped, report, asked, noise))

    def _next(self, batches: Iterator[tuple[Request, Batch]]) -> tuple[Request, Tensor, Tensor]:
        """Return the next micro-batch on the device, ready for the model."""
        with self.watch.part("data"):
            request, (images, labels) = next(batches)
            if len(labels):
                images, labels = self.feed.source.on_device(images, labels, request)
                images = images.contiguous(memory_format=self._format)
            return request, images, labels
