"""One optimizer step on one global batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from hvd_lars.comm.base import Communicator
from hvd_lars.data import GlobalBatches, Request, Source, stream
from hvd_lars.data.randomness import seed_of
from hvd_lars.data.source import Batch, Indices
from hvd_lars.optim import LARS, Placement
from hvd_lars.runtime.stopwatch import Stopwatch
from hvd_lars.state.progress import Progress
from hvd_lars.train.precision import LossScale, Precision, autocast
from hvd_lars.train.schedules import Schedule


class Trainer:
    """One rank's part of every step.

    Args:
        model: on ``device``; every rank's weights become rank 0's.
        optimizer: LARS with ``placement``.
        placement: sums the gradients.
        schedule: γ of every step.
        source: the images.
        batches: which samples make up each step.
        comm: the ranks.
        device: where the model is.
        micro_batch: most samples in one forward and backward pass.
        workers: processes that make batches ahead of time; 0 for none.
        label_smoothing: share of the target spread over all classes.
        precision: of forward and backward; ``fp16`` scales the loss and leaves out steps that
            overflow.
        channels_last: give images to the model in that memory format.
        compiled: what computes ``model`` forward; the model itself when absent.
        average: a moving average of the model, brought up to date after every step.
        total_steps: of the whole run, which batches are made ahead for.
        seed: of dropout, with step and rank.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: LARS,
        placement: Placement,
        schedule: Schedule,
        source: Source,
        batches: GlobalBatches,
        comm: Communicator,
        device: torch.device,
        micro_batch: int,
        total_steps: int,
        seed: int,
        workers: int = 0,
        label_smoothing: float = 0.0,
        average: AveragedModel | None = None,
        precision: Precision = "fp32",
        channels_last: bool = False,
        compiled: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.average = model, average
        self.optimizer, self.placement = optimizer, placement
        self.schedule, self.source, self.batches = schedule, source, batches
        self.comm, self.device = comm, device
        self.micro_batch, self.total_steps = micro_batch, total_steps
        self.seed, self.workers, self.label_smoothing = seed, workers, label_smoothing
        self.precision: Precision = precision
        self.loss_scale = LossScale() if precision == "fp16" else None
        self._forward = model if compiled is None else compiled
        self._format = torch.channels_last if channels_last else torch.preserve_format
        self.progress = Progress()
        self._buffers = list(model.buffers())
        self._held = [buffer.clone() for buffer in self._buffers]
        self.watch = Stopwatch()
        placement.gradients.watch = self.watch

    def batches_from(self, start: int) -> Iterator[tuple[Request, Batch]]:
        """This rank's micro-batches of step ``start`` and all later ones, in order."""
        requests = (
            Request(step // self.batches.steps_per_epoch, piece)
            for step in range(start, self.total_steps)
            for piece in self._pieces(step)
        )
        return stream(self.source, requests, self.workers, self.device.type)

    def _pieces(self, step: int) -> list[Indices]:
        pieces = self.batches.micro_batches(step, self.comm.rank, self.comm.size, self.micro_batch)
        return [piece for piece in pieces if len(piece)]

    def train_step(self, step: int, batches: Iterator[tuple[Request, Batch]]) -> Tensor:
        """One optimizer step on global batch ``step``; returns this rank's share of the loss.

        The loss is a sum over samples divided by the global batch, so that the sum of the ranks'
        gradients is the gradient of the mean, however unevenly the samples are spread.
        ``batches`` stand at the step's first micro-batch.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step)
        self.optimizer.zero_grad()
        if self._buffers:
            torch._foreach_copy_(self._held, self._buffers)
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        share = torch.zeros((), dtype=torch.float64, device=self.device)
        num_pieces = len(self._pieces(step))
        torch.manual_seed(seed_of(self.seed, step, self.comm.rank))  # dropout's
        for i in range(num_pieces):
            images, labels = self._next(batches)
            with self.watch.part("forward"), autocast(self.precision, self.device):
                total = functional.cross_entropy(
                    self._forward(images),
                    labels,
                    reduction="sum",
                    label_smoothing=self.label_smoothing,
                )
                loss = total / self.batches.global_batch
            last = i == num_pieces - 1
            with (
                self.watch.part("backward"),
                nullcontext() if last else self.placement.gradients.no_sync(),
            ):
                (loss * scale).backward()  # type: ignore[no-untyped-call]
            share += loss.detach()
        self._step(share)
        if self.average is not None and not self.optimizer.skipped:
            self.placement.complete_parameters()
            self.average.update_parameters(self.model)
        return share

    def _step(self, share: Tensor) -> None:
        """Let the optimizer step; where a norm is not finite, all ranks leave the step out.

        ``share`` is this rank's part of the loss.  In float16 a step that overflowed because the
        loss was scaled too far is none of those in a row that may end the run.
        """
        scale, progress = self.loss_scale, self.progress
        with self.watch.part("optimizer"):
            self.optimizer.step(loss_scale=1.0 if scale is None else scale.value)
        if not self.optimizer.skipped:
            progress.skipped_in_row = 0
            if scale is not None:
                scale.update(skipped=False)
            return
        progress.skipped_steps += 1
        if scale is None or scale.at_floor or self._lost(share):
            progress.skipped_in_row += 1
        if scale is not None:
            scale.update(skipped=True)
        # What the bad batch did to running statistics is undone as well.
        for buffer, held in zip(self._buffers, self._held, strict=True):
            buffer.copy_(held)

    def _lost(self, share: Tensor) -> bool:
        """Whether any rank's loss, which no scale was applied to, is not finite; collective."""
        lost = (~share.isfinite()).double().cpu()
        self.comm.start_all_reduce_sum(lost, "lost").wait()
        return bool(lost)

    def _next(self, batches: Iterator[tuple[Request, Batch]]) -> Batch:
        """The next micro-batch on the device, ready for the model."""
        with self.watch.part("data"):
            request, (images, labels) = next(batches)
            images, labels = self.source.on_device(images, labels, request)
            return images.contiguous(memory_format=self._format), labels

    def resume(self, progress: Progress) -> None:
        """Go on from a checkpoint, whose tensors are restored already."""
        self.progress = progress
        if not progress.samples:  # of a checkpoint that did not count them
            progress.samples = progress.step * self.batches.global_batch
        if self.loss_scale is not None and progress.loss_scale:
            self.loss_scale.value = max(progress.loss_scale, LossScale.FLOOR)
            self.loss_scale.good_steps = progress.good_steps
