"""The training loop, read from top to bottom.

Imports optim, data, checkpoint, evaluation, metrics and comm.base; takes no Config.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from hvd_lars.checkpoint import Checkpointer
from hvd_lars.comm.base import Communicator
from hvd_lars.data import GlobalBatches, Request, Source, stream
from hvd_lars.data.randomness import seed_of
from hvd_lars.data.source import Batch, Indices
from hvd_lars.evaluation import Evaluation, evaluate
from hvd_lars.metrics import Sink
from hvd_lars.optim import LARS, Placement
from hvd_lars.precision import LossScale, Precision, autocast
from hvd_lars.replicas import broadcast_and_verify, named_state
from hvd_lars.schedules import Schedule
from hvd_lars.stopwatch import Stopwatch


@dataclass(frozen=True)
class Intervals:
    """Lengths in steps: of the run, and between evaluations, log lines and checkpoints."""

    total: int
    evaluate: int
    log: int
    checkpoint: int


@dataclass(frozen=True)
class Summary:
    """What a finished run came to; images per second over training alone."""

    evaluation: Evaluation
    images_per_second: float
    seconds: float


class Trainer:
    """One rank's part of a training run; ``run`` is collective.

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
        eval_batch: most samples in one evaluation pass.
        workers: processes that make batches ahead of time; 0 for none.
        label_smoothing: share of the target spread over all classes.
        precision: of forward and backward; ``fp16`` scales the loss and leaves out steps that
            overflow.
        channels_last: give images to the model in that memory format.
        compiled: what computes ``model`` forward; the model itself when absent.
        average: a moving average of the model, brought up to date after every step.
        intervals: how long, and how often the rest is done.
        checkpointer: keeps the state; nothing is kept without one.
        sinks: take the records; empty but on rank 0.
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
        eval_batch: int,
        intervals: Intervals,
        seed: int,
        checkpointer: Checkpointer | None = None,
        sinks: Sequence[Sink] = (),
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
        self.micro_batch, self.eval_batch = micro_batch, eval_batch
        self.intervals, self.checkpointer, self.sinks = intervals, checkpointer, sinks
        self.seed, self.workers, self.label_smoothing = seed, workers, label_smoothing
        self.precision: Precision = precision
        self.loss_scale = LossScale() if precision == "fp16" else None
        self.skipped_steps = 0
        self._forward = compiled or model
        self._format = torch.channels_last if channels_last else torch.preserve_format
        self.watch = Stopwatch()
        placement.gradients.watch = self.watch

    def run(self) -> Summary:
        """Train from step 0 to the end and return the last evaluation.

        Raises:
            ReplicasDifferError: ranks do not start from the same bits.
            UserError: a checkpoint cannot be written.
        """
        state = named_state(self.model, self.optimizer, self.average)
        broadcast_and_verify(state, self.comm)
        self._record("event", 0, event="start", world_size=self.comm.size)
        self.model.train()
        started = window_started = time.perf_counter()
        aside = 0.0  # seconds spent on evaluation and checkpoints
        window_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        window_steps = 0
        evaluation: Evaluation | None = None
        batches = self.batches_from(0)
        for step in range(self.intervals.total):
            window_loss += self.train_step(step, batches)
            window_steps += 1
            done = step + 1
            last = done == self.intervals.total
            if done % self.intervals.log == 0 or last:
                self._log_window(done, window_loss, window_steps, window_started)
                window_loss.zero_()
                window_steps, window_started = 0, time.perf_counter()
            pause = time.perf_counter()
            if last or done % self.intervals.evaluate == 0 or done % self.intervals.checkpoint == 0:
                self.placement.complete_parameters()
            if done % self.intervals.evaluate == 0 or last:
                evaluation = self._evaluate(done)
            if self.checkpointer is not None and (done % self.intervals.checkpoint == 0 or last):
                progress = {"step": done}
                path = self.checkpointer.save(self.model, self.optimizer, progress, self.average)
                self._record("event", done, event="checkpoint", path=path.name)
            pause = time.perf_counter() - pause
            aside += pause
            window_started += pause
        assert evaluation is not None
        seconds = time.perf_counter() - started
        samples = self.intervals.total * self.batches.global_batch
        self._record("event", self.intervals.total, event="stop", reason="finished")
        for sink in self.sinks:
            sink.close()
        return Summary(evaluation, samples / (seconds - aside), seconds)

    def _evaluate(self, done: int) -> Evaluation:
        """Evaluate the model, and its average where there is one, and record both."""
        options = (self.source, self.comm, self.eval_batch, self.device, self.workers)
        result = evaluate(self.model, *options)
        fields = result.record()
        if self.average is not None:
            fields |= evaluate(self.average.module, *options).record("ema_")
        self._record("eval", done, **fields)
        return result

    def batches_from(self, start: int) -> Iterator[tuple[Request, Batch]]:
        """This rank's micro-batches of step ``start`` and all later ones, in order."""
        requests = (
            Request(step // self.batches.steps_per_epoch, piece)
            for step in range(start, self.intervals.total)
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
        self._step()
        if self.average is not None:
            self.placement.complete_parameters()
            self.average.update_parameters(self.model)
        return share

    def _step(self) -> None:
        """Let the optimizer step; with a loss scale it may find that it cannot."""
        if self.loss_scale is not None:
            self.optimizer.loss_scale = self.loss_scale.value
        with self.watch.part("optimizer"):
            self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.update(self.optimizer.skipped)
            self.skipped_steps += self.optimizer.skipped

    def _next(self, batches: Iterator[tuple[Request, Batch]]) -> Batch:
        """The next micro-batch on the device, ready for the model."""
        with self.watch.part("data"):
            request, (images, labels) = next(batches)
            images, labels = self.source.on_device(images, labels, request)
            return images.contiguous(memory_format=self._format), labels

    def _log_window(self, done: int, loss: Tensor, steps: int, started: float) -> None:
        """Record the means since the last log line; the loss is summed over the ranks."""
        total = loss.clone()
        self.comm.start_all_reduce_sum(total, "loss").wait()
        seconds = time.perf_counter() - started
        self._record(
            "train",
            done,
            samples=done * self.batches.global_batch,
            loss=total.item() / steps,
            lr=self.schedule(done - 1),
            images_per_second=steps * self.batches.global_batch / seconds,
            step_seconds=seconds / steps,
            **{f"{part}_seconds": took / steps for part, took in self.watch.seconds.items()},
            **({} if self.loss_scale is None else {"skipped_steps": self.skipped_steps}),
        )
        self.watch.reset()

    def _record(self, kind: str, step: int, **fields: float | int | str) -> None:
        epoch = round(step / self.batches.steps_per_epoch, 4)
        for sink in self.sinks:
            sink.write({"kind": kind, "step": step, "epoch": epoch, **fields})
