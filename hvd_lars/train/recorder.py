"""Records of a run's steps, layers and ranks."""

from __future__ import annotations

import socket
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from hvd_lars.comm.base import Communicator
from hvd_lars.metrics import Sink
from hvd_lars.runtime.rank_stderr import own_stderr
from hvd_lars.runtime.terminal import warn
from hvd_lars.train.noise_scale import Noise
from hvd_lars.train.trainer import Trainer

_SLOW, _WINDOWS = 1.5, 3  # a straggler: times the median, for log windows in a row
_NAME = 64  # bytes of a host name


@final
class Recorder:
    """Collects over a log window; all methods except ``record`` and ``pause`` are collective.

    Args:
        trainer: takes the steps.
        sinks: receive the records; empty except on rank 0.
        layers_every: steps between records of all layers' norms; 0 for none.
    """

    def __init__(self, trainer: Trainer, sinks: Sequence[Sink] = (), layers_every: int = 0) -> None:
        self._trainer, self._comm = trainer, trainer.comm
        self.sinks, self.layers_every = sinks, layers_every
        self._loss = torch.zeros((), dtype=torch.float64, device=trainer.feed.device)
        self._names: dict[Tensor, str] = {
            param: name for name, param in trainer.model.named_parameters()
        }
        self._hosts: list[str] = []
        self._slow: Counter[int] = Counter()  # windows in a row, by rank
        self._started = 0.0

    def record(self, kind: str, step: int, **fields: object) -> None:
        """Write a record to the sinks."""
        epoch = round(step / self._trainer.feed.batches.steps_per_epoch, 4)
        for sink in self.sinks:
            sink.write({"kind": kind, "step": step, "epoch": epoch, **fields})

    def begin(self) -> None:
        """Begin or resume the run, perhaps in the middle of a window."""
        progress = self._trainer.state.progress
        step = progress.step
        self._loss.fill_(progress.loss_of(self._comm.rank, self._comm.size))
        self._hosts = hosts_of(self._comm)
        settle_warnings(self._comm)
        event = "resume" if step else "start"
        self.record("event", step, event=event, world_size=self._comm.size, hosts=self._hosts)
        self._started = time.perf_counter()

    def pause(self, seconds: float) -> None:
        """Exclude seconds that were not spent on training."""
        self._started += seconds

    def losses(self) -> list[float]:
        """Return the window's sum of losses so far, by rank."""
        losses = torch.zeros(self._comm.size, dtype=torch.float64)
        losses[self._comm.rank] = self._loss.item()
        self._comm.start_all_reduce_sum(losses, "window_losses").wait()
        return losses.tolist()

    def add_loss(self, share: Tensor) -> None:
        """Add a step's share of the loss."""
        self._loss += share

    def step_taken(self, step: int, noise: Noise | None) -> None:
        """Record the norms of a step and its ``noise``, if that is due."""
        if self.layers_every and step % self.layers_every == 0:
            self._log_layers(step, noise)

    def log_window(self) -> None:
        """Record the means since the last log line; the loss is summed over the ranks."""
        trainer, progress = self._trainer, self._trainer.state.progress
        steps, size, rank = progress.window_steps, self._comm.size, self._comm.rank
        took = {part: s / max(steps, 1) for part, s in trainer.watch.seconds.items()}
        # The loss, then each rank's seconds of data and of compute, and digest of its warnings.
        sums = torch.zeros(1 + 3 * size, dtype=torch.float64)
        sums[0] = self._loss.item()
        sums[1 + rank] = took["data"]
        sums[1 + size + rank] = took["forward"] + took["backward"] + took["optimizer"]
        sums[1 + 2 * size + rank] = _sample()
        self._comm.start_all_reduce_sum(sums, "window").wait()
        seconds = time.perf_counter() - self._started
        data, busy, warned = sums[1:].view(3, size).tolist()
        _settle(self._comm, warned)
        ranks = {"rank_data_seconds": data, "rank_busy_seconds": busy} if size > 1 else {}
        self.record(
            "train",
            progress.step,
            samples=progress.samples,
            loss=sums[0].item() / steps if steps else float("nan"),
            lr=trainer.schedule(progress.step - 1),
            images_per_second=steps * trainer.global_batch / seconds,
            step_seconds=seconds / max(steps, 1),
            **{f"{part}_seconds": value for part, value in took.items()},
            **ranks,
            **({} if (batch := progress.critical_batch) is None else {"critical_batch": batch}),
            **({"skipped_steps": progress.skipped_steps} if progress.skipped_steps else {}),
        )
        self._look_for_stragglers([d + b for d, b in zip(data, busy, strict=True)])
        trainer.watch.reset()
        self._loss.zero_()
        trainer.state.window_logged()
        self._started = time.perf_counter()

    def _log_layers(self, step: int, noise: Noise | None) -> None:
        """Record norms that the step computed anyway, by parameter name."""
        if not self.sinks:
            return
        rows = self._trainer.optimizer.report.norms()
        names = [self._names[row.param] for row in rows]
        columns = {
            "weight_norm": [row.weight for row in rows],
            "gradient_norm": [row.gradient for row in rows],
            "trust_ratio": [row.ratio for row in rows],
            "rate": [row.rate for row in rows],
        }
        if noise is not None:
            columns["noise_trace"] = [noise.traces[row.param] for row in rows]
            columns["noise_signal"] = [noise.signals[row.param] for row in rows]
        table = {key: dict(zip(names, values, strict=True)) for key, values in columns.items()}
        self.record("layers", step, lr=self._trainer.schedule(step - 1), **table)

    def _look_for_stragglers(self, seconds: list[float]) -> None:
        """Warn once of a rank that has been slower than the others for a while."""
        usual = statistics.median_low(seconds)
        slow = {rank for rank, took in enumerate(seconds) if took > _SLOW * usual}
        self._slow = Counter({rank: self._slow[rank] + 1 for rank in slow})
        for rank in sorted(slow):
            if self._slow[rank] == _WINDOWS and self.sinks:
                host = self._hosts[rank] if rank < len(self._hosts) else "?"
                warn(
                    f"rank {rank} on {host} takes {1e3 * seconds[rank]:,.0f} ms a step without "
                    f"waiting for others, the median rank {1e3 * usual:,.0f} ms"
                )
                step = self._trainer.state.progress.step
                self.record("event", step, event="straggler", rank=rank, host=host)


def hosts_of(comm: Communicator) -> list[str]:
    """Return the host name of every rank, by rank; collective."""
    table = torch.zeros(comm.size, _NAME, dtype=torch.int32)
    name = socket.gethostname().encode()[:_NAME]
    table[comm.rank, : len(name)] = torch.tensor(list(name), dtype=torch.int32)
    comm.start_all_reduce_sum(table, "hosts").wait()
    return [bytes(filter(None, row)).decode(errors="replace") for row in table.tolist()]


def settle_warnings(comm: Communicator) -> None:
    """Show this rank's warnings that rank 0 did not give; collective."""
    warned = torch.zeros(comm.size, dtype=torch.float64)
    warned[comm.rank] = _sample()
    comm.start_all_reduce_sum(warned, "warnings").wait()
    _settle(comm, warned.tolist())


def _sample() -> int:
    own = own_stderr()
    return 0 if own is None else own.sample()


def _settle(comm: Communicator, digests: list[float]) -> None:
    """Broadcast rank 0's warnings if any of ``digests``, which are of all ranks, differ."""
    own = own_stderr()
    given = [] if own is None else own.sampled()
    if len(set(digests)) > 1:
        given = comm.broadcast_object(given)
    if own is not None:
        own.settle(set(given))
