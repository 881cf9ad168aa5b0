"""Build a trainer from a config and a communicator."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from hvd_lars.assemble.choices import settle
from hvd_lars.assemble.dataset import build_source
from hvd_lars.assemble.forward import make_forward
from hvd_lars.assemble.network import build_network, check_batch_norm
from hvd_lars.assemble.placing import place
from hvd_lars.assemble.plan import Plan, make_plan
from hvd_lars.assemble.resuming import checkpoints_in
from hvd_lars.comm.agree import on_root
from hvd_lars.comm.base import Communicator
from hvd_lars.config.schema import Config
from hvd_lars.data.sampler import GlobalBatches
from hvd_lars.data.source import Source
from hvd_lars.errors import UserError
from hvd_lars.launchers.environment import Launch
from hvd_lars.models import load_weights
from hvd_lars.models.batch_norm import span_ranks
from hvd_lars.models.moving_average import MovingAverage
from hvd_lars.optim import Placement, Sharded
from hvd_lars.runtime.device import choose_device, set_threads
from hvd_lars.runtime.files import expand_user
from hvd_lars.runtime.stopwatch import Stopwatch
from hvd_lars.runtime.terminal import tell, warn
from hvd_lars.state.checkpoint_files import find
from hvd_lars.state.run_state import RunState
from hvd_lars.train.feed import Feed
from hvd_lars.train.trainer import StepOptions, Trainer


@dataclass(frozen=True)
class Built:
    """A trainer, its plan, and the config with all choices made."""

    trainer: Trainer
    plan: Plan
    config: Config


def build_trainer(
    config: Config, comm: Communicator, launch: Launch, watch: Stopwatch | None = None
) -> Built:
    """Build everything that a step needs, and write nothing; collective.

    Ranks do not hold the same bits yet: broadcast or load ``trainer.state`` before the first step.

    Args:
        config: config of the run.
        comm: the ranks.
        launch: how they were started.
        watch: times the parts of a step.

    Raises:
        UserError: on every rank alike: the config cannot be run.
    """
    threads = set_threads(config.train.threads, launch)
    device = choose_device(comm.local_rank)
    source = build_source(config, comm, device)
    plan = make_plan(config, source.num_train, comm.size)
    model, average = _build_models(config, comm, plan, source.num_classes, device)
    config = settle(config, model, source.num_classes, comm, device)
    _join_batch_norms(model, comm, config.model.bn_sync_ranks)
    placement = place(model, comm, config.optimizer, config.comm, watch)
    optimizer = config.optimizer.build(model, plan.schedule(0), placement)
    feed = _build_feed(config, source, comm, device, plan)
    forward = make_forward(config, model, placement, feed)
    if forward is None:
        _overlap_gathering(placement, model, launch, threads)
    train = config.train
    trainer = Trainer(
        RunState(model, optimizer, average),
        placement,
        feed,
        plan.schedule,
        comm,
        StepOptions(
            seed=config.run.seed,
            label_smoothing=train.label_smoothing,
            precision=train.precision,
            channels_last=train.channels_last,
            max_skipped_steps=train.max_skipped_steps,
            noise_every=plan.intervals.layers,
            read_late=device.type == "cuda",
        ),
        forward,
    )
    return Built(trainer, plan, config)


def _build_models(
    config: Config, comm: Communicator, plan: Plan, num_classes: int, device: torch.device
) -> tuple[nn.Module, MovingAverage | None]:
    """Return the network with its initial weights, on the device, and its moving average."""
    torch.manual_seed(config.run.seed)
    model = build_network(config.model, config.data, num_classes, device)
    check_batch_norm(model, config, plan)
    if (path := config.model.init_from) is not None:
        # On rank 0 only: its weights are broadcast before the first step.
        taken = on_root(comm, lambda: load_weights(model, _sound(path), num_classes))
        for line in taken.lines() if comm.rank == 0 else ():
            tell(f"model.init_from: {path}: {line}")
    if config.train.channels_last:  # before the average, whose memory is then like the model's
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = None
    if config.model.ema_decay is not None:
        average = MovingAverage(model, config.model.ema_decay)
    return model, average


def _sound(path: str) -> str:
    """Return the newest undamaged checkpoint of a run folder; another path as it is."""
    folder = checkpoints_in(expand_user(path, "model.init_from"))
    found = find(folder) if folder.is_dir() else None
    if found is None:
        return path
    for line in found.passed_over:
        warn(f"model.init_from: {line}; using {found.folder}")
    return str(found.folder)


def _join_batch_norms(model: nn.Module, comm: Communicator, ranks: int) -> None:
    if ranks > 1:
        try:
            if not span_ranks(model, comm.group(ranks)):
                raise ValueError("the network has no BatchNorm")
        except ValueError as error:
            raise UserError(f"model.bn_sync_ranks: {error}") from None


def _overlap_gathering(
    placement: Placement, model: nn.Module, launch: Launch, threads: int
) -> None:
    """Gather sharded parameters during the next forward pass, where that is faster.

    On the CPU, only if a core is free for it: otherwise it would slow forward down.
    """
    if isinstance(placement, Sharded):
        cores = len(os.sched_getaffinity(0))
        on_gpu = next(model.parameters()).is_cuda
        if on_gpu or cores >= (launch.local_size or cores) * (threads + 1):
            placement.gather_during_forward(model)


def _build_feed(
    config: Config, source: Source, comm: Communicator, device: torch.device, plan: Plan
) -> Feed:
    batches = GlobalBatches(
        source.num_train,
        config.train.global_batch,
        config.run.seed,
        pairs=config.data.mixes_pairs,
    )
    return Feed(
        source,
        batches,
        comm,
        device,
        config.train.micro_batch,
        plan.intervals.total,
        config.data.num_workers,
    )
