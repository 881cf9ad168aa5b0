"""Measure how fast a config trains on made-up images."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import dataclass

import torch
from scipy import stats

from hvd_lars.assemble.trainer import build_trainer
from hvd_lars.comm.base import Communicator
from hvd_lars.config.schedule import Schedule
from hvd_lars.config.schema import Config
from hvd_lars.launchers.environment import Launch
from hvd_lars.optim import Sharded
from hvd_lars.runtime.stopwatch import PARTS, Stopwatch
from hvd_lars.settings.durations import Duration
from hvd_lars.state.replicas import broadcast_and_verify
from hvd_lars.train.trainer import Trainer

# A step reads weights and gradients for the norms, then reads them again with the momentum, and
# writes weights and momentum: 7 float32 values.
BYTES_A_PARAMETER = 28


@dataclass(frozen=True)
class Bench:
    """A measurement; times are means over steps and ranks, memory is the largest rank's."""

    ranks: int
    global_batch: int
    micro_batch: int
    parameters: int
    kernel: str
    placement: str
    images_per_second: float  # over all ranks
    half_interval: float  # half of that mean's 95 % interval over the windows
    windows: tuple[float, ...]  # images/s of each window
    step_seconds: float
    part_seconds: dict[str, float]  # per step, by stopwatch.PARTS
    floor_seconds: float  # 28 bytes per parameter that a rank updates, at measured bandwidth
    peak_bytes: int

    @property
    def floor_ratio(self) -> float:
        """Optimizer time divided by its floor."""
        return self.part_seconds["optimizer"] / self.floor_seconds


def bench(
    config: Config, comm: Communicator, launch: Launch, windows: int, steps: int, accumulate: int
) -> Bench:
    """Train on random images for ``windows`` windows of ``steps`` steps; collective.

    Every rank processes ``accumulate`` full micro-batches per step.  A warm-up window comes first.
    Digits and glyphs are in memory and used as they are; other data is replaced by random images
    of its shape.

    Raises:
        UserError: on every rank alike: the config cannot be run.
    """
    total = (windows + 1) * steps
    watch = Stopwatch(torch.cuda.synchronize if torch.cuda.is_available() else None)
    built = build_trainer(_bench_config(config, comm.size, total, accumulate), comm, launch, watch)
    trainer, config = built.trainer, built.config
    broadcast_and_verify(trainer.state.tensors(), comm)
    on_gpu = trainer.feed.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.model.train()
    batches = trainer.feed.from_step(0)
    rates, seconds = [], []
    for window in range(windows + 1):
        comm.barrier()
        if window == 1:
            trainer.watch.reset()
        started = time.perf_counter()
        for _ in range(steps):
            trainer.train_step(batches)
        if on_gpu:
            torch.cuda.synchronize()
        taken = mean_over_ranks(time.perf_counter() - started, comm)
        if window > 0:
            seconds.append(taken)
            rates.append(steps * trainer.global_batch / taken)
    half = stats.t.ppf(0.975, windows - 1) * statistics.stdev(rates) / windows**0.5
    parts = {
        part: mean_over_ranks(took / (windows * steps), comm)
        for part, took in trainer.watch.seconds.items()
    }
    # The memory of CUDA graphs counts as allocated in no step.
    peak = torch.cuda.max_memory_reserved() if on_gpu else _resident_peak()
    numels = [param.numel() for param in trainer.model.parameters() if param.requires_grad]
    updated = sum(numels) // (comm.size if isinstance(trainer.placement, Sharded) else 1)
    return Bench(
        ranks=comm.size,
        global_batch=trainer.global_batch,
        micro_batch=config.train.micro_batch,
        parameters=sum(numels),
        kernel=trainer.optimizer.param_groups[0].get("kernel", "eager"),
        placement=type(trainer.placement).__name__.lower(),
        images_per_second=statistics.mean(rates),
        half_interval=float(half),
        windows=tuple(rates),
        step_seconds=sum(seconds) / (windows * steps),
        part_seconds={part: parts[part] for part in PARTS},
        floor_seconds=_floor_seconds(updated, trainer, comm),
        peak_bytes=int(_largest_over_ranks(float(peak), comm)),
    )


def _bench_config(config: Config, ranks: int, total: int, accumulate: int) -> Config:
    """Return the config with full micro-batches of made-up images and a tiny learning rate."""
    all_steps = Duration(total, "steps")
    batch = config.train.micro_batch * ranks * accumulate
    train = config.train.model_copy(
        update={
            "duration": all_steps,
            "global_batch": batch,
            "eval_every": all_steps,
            "log_every": all_steps,
        }
    )
    return config.model_copy(
        update={
            "data": config.data.made_up(batch),
            "train": train,
            "schedule": Schedule(base_lr=1e-6, policy="constant"),
            "checkpoint": config.checkpoint.model_copy(update={"every": all_steps}),
        }
    )


def mean_over_ranks(value: float, comm: Communicator) -> float:
    """Return the mean of the ranks' values, the same on all; collective."""
    total = torch.tensor(value, dtype=torch.float64)
    comm.start_all_reduce_sum(total, "bench").wait()
    return total.item() / comm.size


def _largest_over_ranks(value: float, comm: Communicator) -> float:
    values = torch.zeros(comm.size, dtype=torch.float64)
    values[comm.rank] = value
    comm.start_all_reduce_sum(values, "bench").wait()
    return values.max().item()


def _floor_seconds(parameters: int, trainer: Trainer, comm: Communicator) -> float:
    """Time the memory traffic of a step, as ``a += b`` on all ranks at once: 12 bytes each."""
    a = torch.zeros(max(1, parameters * BYTES_A_PARAMETER // 12), device=trainer.feed.device)
    b = torch.ones_like(a)
    taken = []
    for _ in range(7):
        comm.barrier()
        started = time.perf_counter()
        a.add_(b)
        if a.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return mean_over_ranks(statistics.median(taken), comm)


def _resident_peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
